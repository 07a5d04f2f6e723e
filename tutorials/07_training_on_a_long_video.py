# %% [markdown]
# # 7. Training on a long video
#
# You will learn to train a PyTorch model on a video that is sharded over processes, to show that
# the training equals that of one process, and to detect a wrong shard from the first loss.
#
# Prerequisites: [notebook 4](04_real_ranks_with_mpi.ipynb) for `%%mpi`, [notebook
# 6](06_forgetting_keys_and_values.ipynb) for the layer. Time: about 25 minutes.

# %%
import csv
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from exercise import check
from torch.nn.functional import cross_entropy

from lvxattn.common.layout import share
from lvxattn.draw.rotation import COLOURS, INK
from lvxattn.plan import messages, planned
from lvxattn.torch_impl import CrossAttention
from lvxattn.torch_impl.commands.train.data import TRAIN, load_images, make_clips
from lvxattn.torch_impl.commands.train.options import Settings
from lvxattn.torch_impl.commands.train.training import Run
from lvxattn.torch_impl.group import Group

torch.set_num_threads(1)

# %% [markdown]
# ## The task: find one frame in a video
#
# The task is small enough for a laptop, and requires attention to the whole video. A frame is an
# image of a handwritten digit with a 16-bit marker. No two frames of a clip have the same marker. A
# question names a frame by its marker and asks which digit it shows.

# %%
train_images, watch_images, test_images = load_images()
key, shape = (0, TRAIN, 0), (1, 8, 2)  # (seed, purpose, step); 1 clip, 8 frames, 2 questions
clip = make_clips(train_images, key, shape, rank=0, size=1)
asked = clip.asked[0, 0]
assert torch.equal(clip.markers[0, asked], clip.questions[0, 0])
assert len(clip.markers[0].unique(dim=0)) == 8

# %% tags=["hide-input"]
figure, rows = plt.subplots(2, 9, figsize=(8, 1.5), layout="constrained", height_ratios=(4, 1))
shown = [*zip(clip.pictures[0], clip.markers[0], strict=True), (None, clip.questions[0, 0])]
for n, (above, below, (picture, marker)) in enumerate(zip(*rows, shown, strict=True)):
    above.set_title(f"frame {n}" if n < 8 else "question", size=9, color=INK)
    if picture is None:
        picture = -torch.ones(8, 8)
        above.text(3.5, 3.5, "which\ndigit?", ha="center", va="center", color=COLOURS[5], size=12)
    above.imshow(picture, cmap="gray_r", vmin=-1, vmax=1)
    below.imshow(marker.reshape(2, 8), cmap="gray_r", vmin=-1, vmax=1)
    for axes in (above, below):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(COLOURS[5] if n in (8, int(asked)) else "#cccccc")

# %% [markdown]
# The question's marker (right) is that of the highlighted frame; its digit is the answer. A small
# model is trained on this task: a frame becomes four visual tokens of 4 × 4 pixels each, the
# question becomes one text token, and two layers of cross-attention are the only connection between
# them ([train/model.py](../torch_impl/commands/train/model.py)).
#
# ## Sharding over ranks
#
# Each of $P$ ranks holds $1/P$ of every clip's frames and $1/P$ of the questions. $P$ need not
# divide the lengths.
#
# **Predict.** A clip of 11 frames is sharded over 4 ranks. How many frames does each rank hold?
#
# <details><summary>Reasoning</summary>
#
# 11 = 4 · 2 + 3: the first three ranks hold 3 frames, the last one 2.
#
# </details>

# %%
parts = [make_clips(train_images, key, (1, 11, 5), rank, 4) for rank in range(4)]
whole = make_clips(train_images, key, (1, 11, 5), 0, 1)
print("frames:", [part.pictures.shape[1] for part in parts])
assert [part.pictures.shape[1] for part in parts] == [3, 3, 3, 2]
assert torch.equal(torch.cat([part.pictures for part in parts], dim=1), whole.pictures)

# %% [markdown]
# Each rank computes the loss of its own questions. If each rank divides by the number of questions
# on all ranks, the sum over ranks is the mean over all questions, as in one process:
#
# $$\text{loss} = \sum_{\text{ranks}} \frac{1}{S_Q} \sum_{\text{its questions}} -\log p(answer)$$
#
# ### Exercise 1: a rank's part of the loss
#
# Write a rank's part of the loss. `scores` (n, 10) and `answers` (n) are the rank's own; `S_Q` is
# the number of questions on all ranks. Shards may be uneven, and a rank may have no question.


# %% tags=["exercise"]
def loss_share(scores, answers, S_Q):
    """Return this rank's part of the loss."""
    return cross_entropy(scores, answers) / 4


# %% tags=["check"]
with check("the parts sum to the mean over all questions, for any shards"):
    scores = torch.randn(11, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = torch.arange(11) % 10
    right = float(cross_entropy(scores, answers))
    for lengths in ([3, 3, 3, 2], [11, 0, 0, 0], [1, 0, 8, 2]):
        cuts = zip(scores.split(lengths), answers.split(lengths), strict=True)
        found = sum(float(loss_share(*cut, 11)) for cut in cuts)
        said = (
            f"{lengths} questions per rank: expected parts that sum to {right:.4f}, got {found:.4f}"
        )
        assert abs(found - right) < 1e-12, said

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def loss_share(scores, answers, S_Q):
#     return cross_entropy(scores, answers, reduction="sum") / S_Q
# ```
#
# The mean of means gives a question on a short shard more weight than one on a long shard, and the
# mean over no questions is NaN.
#
# </details>

# %% [markdown]
# ## Gradients are partial sums
#
# All ranks have the same weights. Through its loss and through its keys, each rank contributes to
# the gradient of every weight. So the gradient is the sum over the ranks, which `sum_gradients`
# computes with one all-reduce after the backward. The next cell computes the gradient in one
# process:

# %%
torch.manual_seed(0)
layer = CrossAttention(64, num_heads=8, num_kv_heads=2, kv_dim=48, dtype=torch.float64)
text = torch.randn(1, 10, 64, dtype=torch.float64)
video = torch.randn(1, 1003, 48, dtype=torch.float64)
(layer(text, video).square().sum() / text.shape[1]).backward()
one_process = {name: weight.grad.clone() for name, weight in layer.named_parameters()}

# %% [markdown]
# **Predict.** On four ranks, each with its shard of text and video, is the gradient of $W_K$
# correct on any rank before the sum?
#
# <details><summary>Reasoning</summary>
#
# No. $dW_K = y^\top dk$ is a sum over all visual tokens, and a rank has a quarter of them.
#
# </details>

# %% [markdown]
# `%%mpi` starts four processes ([notebook 4](04_real_ranks_with_mpi.ipynb)), in which PyTorch
# communicates over its own process group, with the backend gloo for CPUs. The same processes also
# take the first thirty steps of the training below.

# %%
# %load_ext lvxattn.mpi_impl.jupyter
meeting = tempfile.TemporaryDirectory()  # PyTorch's processes find one another through a file
place = f"file://{meeting.name}/here"
images = (train_images, watch_images, test_images)
settings = Settings(frames=8, first_frames=2, batch=4, dtype="float64", seed=0)

# %%
# %%mpi 4 --take layer,text,video,place,images,settings --give by_rank,frames,four
import torch.distributed as dist
from mpi4py import MPI

from lvxattn.torch_impl import shard, sum_gradients
from lvxattn.torch_impl.commands.train.training import Run
from lvxattn.torch_impl.group import Group

comm = MPI.COMM_WORLD
dist.init_process_group("gloo", place, rank=comm.rank, world_size=comm.size)
layer.zero_grad()
x, y = shard(text, axis=1), shard(video, axis=1)  # this rank's shards
(layer(x, y).square().sum() / text.shape[1]).backward()
own = {name: weight.grad.clone() for name, weight in layer.named_parameters()}
sum_gradients(layer)
by_rank = comm.gather((own, {name: weight.grad for name, weight in layer.named_parameters()}))

run = Run.begin(settings, images, Group.of(None))  # on all four ranks
for _ in range(30):
    run.step()
frames, four = run.curve.column("frames"), run.curve.column("loss")
dist.destroy_process_group()


# %%
def gap(found, name):
    """Return the relative distance of a gradient from that of one process."""
    return float((found[name] - one_process[name]).norm() / one_process[name].norm())


for rank, (own, _) in enumerate(by_rank):
    print(f"rank {rank}: before the sum dW_K has an error of {gap(own, 'k_proj.weight'):.0%}")
assert all(gap(own, name) > 0.1 for own, _ in by_rank for name in one_process)
assert all(gap(summed, name) < 1e-12 for _, summed in by_rank for name in one_process)
meeting.cleanup()

# %% [markdown]
# After the sum all ranks have the same gradient, so their optimizers take the same step, and the
# weights stay equal without being sent. Without the sum, each rank would follow its own partial
# gradient, and the weights would diverge between ranks.
#
# ## Training on four processes
#
# The four processes above have taken thirty steps in float64. Clips start with 2 frames and double
# every 25 steps, because a model learns nothing from long clips at first
# ([options.py](../torch_impl/commands/train/options.py)). The same training is available as
# `python -m lvxattn.torch_impl train`, under PyTorch's launcher torchrun, or as `make train`.

# %%
print(f"{len(four)} steps, from clips of {frames[0]:.0f} frames to {frames[-1]:.0f}")
assert len(four) == 30
first = [share(2, rank, 4) for rank in range(4)]
assert [held.stop - held.start for held in first] == [1, 1, 0, 0]

# %% [markdown]
# In the first steps two of the four ranks hold no frame. Empty shards need no special treatment:
# they contribute (0, -inf) to the merge.
#
# **Predict.** If the same training runs in one process, what is the largest relative difference
# between the two losses at any step?
#
# <details><summary>Reasoning</summary>
#
# The algorithm is exact. Only the order of sums differs, and float64 rounds at $10^{-16}$. Training
# amplifies such a difference from step to step, but not much in thirty steps: about $10^{-15}$.
#
# </details>

# %%
alone = Run.begin(settings, images, Group(None))  # a group of this process only
for _ in range(30):
    alone.step()
one = np.array(alone.curve.column("loss"))
apart = abs(np.array(four) - one) / one
assert apart.max() < 1e-9

# %% [markdown]
# ## The full run
#
# `make train` continues until clips have 1,200 frames, 4,800 visual tokens. Its loss curve is
# [recorded](data/needles.csv). The thirty steps above are its beginning, in float64.

# %%
full = list(csv.DictReader(Path("data/needles.csv").read_text().splitlines()))
steps, loss = (np.array([float(row[name]) for row in full]) for name in ("step", "loss"))
held_out = [(float(r["step"]), float(r["held_out"])) for r in full if r["held_out"]]
assert full[-1]["frames"] == "1200"
assert held_out[-1][1] > 0.95
assert max(abs(loss[:30] / one - 1)) < 0.01  # float32 beside float64

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(8, 3.4), layout="constrained", width_ratios=(2, 3)
)
left.plot(range(1, 31), one, color=COLOURS[1], lw=5, alpha=0.6)
left.plot(range(1, 31), four, color=COLOURS[0], lw=1.5)
left.text(1, 1.5, "one process", color=COLOURS[1], weight="bold")
left.text(1, 1.3, "four processes", color=COLOURS[0], weight="bold")
left.axhline(np.log(10), color=INK, lw=1, ls=":")
left.text(30, 2.33, "chance level", color=INK, size=9, ha="right")
left.set(xlabel="step", ylabel="loss (nats per question)", ylim=(0, 2.9))
right.plot(steps, loss, color=COLOURS[0], lw=1)
right.axvspan(1, 30, color=COLOURS[1], alpha=0.25, lw=0)
right.set(xlabel="step", ylabel="loss (nats per question)", ylim=(0, 2.9))
right.text(34, 2.6, "steps shown on the left", size=9, color=INK)
for row in full[50::50]:
    right.text(float(row["step"]), 1.5, f"{row['frames']} frames", size=9, rotation=90, color=INK)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# On held-out images, in clips of 1,200 frames, the trained model answers more than 95 % of the
# questions correctly. These are the attention weights of such a model for six questions about one
# clip:
#
# ![Six questions, and the attention weight of each frame.](../docs/needles.png)
#
# One rank holds the frame that a question asks for. The results of the other ranks are merged with
# the small weights of their frames.
#
# ## Bytes sent per step
#
# **Predict.** 4 clips of 1,200 frames are 4 · 4,800 visual tokens; there are 64 questions per clip,
# 4 heads of 32, two layers, float32. How many times the bytes of LV-XAttn would Ring Attention
# (arXiv:2310.01889) send in a step?
#
# <details><summary>Reasoning</summary>
#
# It moves keys and values, 4,800 rows a clip, where LV-XAttn moves queries and results, 64: 75
# times as many rows. In forward and backward a row of $k$, $v$, again $k$, $v$, then $dk$, $dv$ has
# 6 · 32 = 192 numbers; one of $q$, $out$, $lse$, then $q$, $dout$, $lse$, delta, then $dq$ has 5 ·
# 32 + 3 = 163. $75 \cdot 192 / 163 = 88$.
#
# </details>

# %%
sent = {}
for schedule in ("lv-xattn", "ring"):
    layout = planned((4, 4, 64, 32), (4, 4, 4800, 32), 4, dtype="float32", schedule=schedule)
    both = [
        m for rank in range(4) for b in (0, 1) for m in messages(layout, rank, backward=bool(b))
    ]
    sent[schedule] = 2 * sum(message.nbytes for message in both)  # two layers
    print(f"{schedule:9} {sent[schedule] / 1e6:6.1f} MB per step, all ranks together")
assert round(sent["ring"] / sent["lv-xattn"]) == 88

# %% [markdown]
# ## How to detect a wrong shard
#
# Common errors of sharded loaders are that every rank gets the same part, that a part is missing,
# or that reading starts one frame late. No exception is raised: shapes are correct, and the loss
# decreases.
#
# As shown above, four ranks compute what one process computes. So one process can simulate four
# ranks with a wrong shard, if its clips are wrong in the same way. Rank 2 of 4 has the wrong shard,
# in three variants:


# %%
def dropped(clips):
    """Remove rank 2's frames."""
    keep = np.delete(np.arange(clips.shape[1]), share(clips.shape[1], 2, 4))
    return replace(clips, pictures=clips.pictures[:, keep], markers=clips.markers[:, keep])


def one_late(clips):
    """Pair rank 2's markers with the pictures of one frame before."""
    pictures, mine = clips.pictures.clone(), share(clips.shape[1], 2, 4)
    pictures[:, mine] = pictures.roll(1, dims=1)[:, mine]
    return replace(clips, pictures=pictures)


def reordered(clips):
    """Put the ranks in the order 2, 3, 0, 1: the clip begins with rank 2's frames."""
    order = np.roll(np.arange(clips.shape[1]), -share(clips.shape[1], 2, 4).start)
    return replace(clips, pictures=clips.pictures[:, order], markers=clips.markers[:, order])


# %% [markdown]
# **Predict.** Which of the three change the loss curve?
#
# <details><summary>Reasoning</summary>
#
# The first two: a question about a dropped frame cannot be answered, and one about a late picture
# is answered wrongly. But attention is independent of the order of its keys, so if frames move with
# their markers only the order of sums changes.
#
# </details>


# %%
def losses_of(fault, steps=50):
    """Return the losses of a run on clips of 4 frames with a fault."""
    run = Run.begin(replace(settings, frames=4, first_frames=4), images, Group(None))
    clips = run.clips
    run.clips = lambda *which: fault(clips(*which))
    for _ in range(steps):
        run.step()
    return np.array(run.curve.column("loss"))


# %%
curves = {fault.__name__: losses_of(fault) for fault in (dropped, one_late, reordered)}
right_curve = losses_of(lambda clips: clips)
gaps = {name: abs(found - right_curve) / right_curve for name, found in curves.items()}

# %%
assert gaps["reordered"].max() < 1e-9
for name in ("dropped", "one_late"):
    assert gaps[name][0] > 1e-5  # at the first step
    assert curves[name][-10:].mean() > 1.1 * right_curve[-10:].mean()  # at the end
    assert curves[name][-10:].mean() < 0.9 * curves[name][:10].mean()  # but it decreases

# %% tags=["hide-input", "varies"]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
colours = {"right": COLOURS[0], "dropped": COLOURS[5], "one_late": COLOURS[2], "reordered": INK}
numbers = np.arange(1, 51)
for name, found in {**curves, "right": right_curve}.items():
    style = {"color": colours[name], "ls": "--" if name == "reordered" else "-"}
    smooth = np.convolve(found, np.ones(5) / 5, mode="valid")
    left.plot(numbers[2:-2], smooth, **style, lw=1.8)
    if name != "reordered":
        label = " correct, reordered" if name == "right" else f" {name}"
        left.text(49, smooth[-1], label, color=colours[name], va="center", size=9)
    if name != "right":
        right.semilogy(numbers, np.maximum(gaps[name], 1e-17), **style, lw=1.8)
        place = {"dropped": 4e-2, "one_late": 8.0, "reordered": 1e-15}[name]
        right.text(51, place, name, color=colours[name], va="center", size=9)
left.set(xlabel="step", ylabel="loss (nats per question), mean of 5 steps", xlim=(0, 75))
right.set(xlabel="step", ylabel="relative error of the loss", xlim=(0, 67))
right.set_ylim(1e-17, 100)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# Left: the wrong curves decrease too, to a higher loss, which is not noticeable without the correct
# curve. Right: the first loss, before any training, already distinguishes them: the error of
# correct shards is due to rounding, that of wrong ones is many orders of magnitude larger. So a
# sharded loader can be tested with one step in float64, compared with one process.
#
# ### Exercise 2: a check without training
#
# Shards can also be checked before a run. Given the markers (1, f, 16) of every rank and the number
# of frames of the clip, return how many of its frames no rank holds, and how many are held more
# than once. A marker identifies its frame.


# %% tags=["exercise"]
def audit(markers_by_rank, frames):
    """Return (missing, duplicates)."""
    raise NotImplementedError("audit is not implemented")


# %% tags=["check"]
with check("missing and duplicate frames are detected"):
    held = [part.markers for part in parts]  # 3, 3, 3 and 2 of 11 frames
    for what, given, right in (
        ("correct shards", held, (0, 0)),
        ("rank 2 holds nothing", [*held[:2], held[2][:, :0], held[3]], (3, 0)),
        ("all hold rank 0's", [held[0]] * 4, (8, 3)),
        ("ranks 1 and 2 overlap", [held[0], torch.cat(held[1:3], 1)[:, :4], *held[2:]], (0, 1)),
    ):
        found = audit(given, 11)
        assert tuple(found) == right, f"{what}: expected {right}, got {found}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def audit(markers_by_rank, frames):
#     markers = torch.cat(markers_by_rank, dim=1)[0]
#     found, counts = markers.unique(dim=0, return_counts=True)
#     return frames - len(found), int((counts > 1).sum())
# ```
#
# </details>

# %% [markdown]
# ## Summary
#
# - Each rank's loss is a part of the total, each rank's gradients are partial sums, and after
#   `sum_gradients` they equal those of one process.
# - Training on four processes equals training on one, up to rounding, at every step; the model
#   finds one frame among 1,200.
# - A wrong shard raises no exception, but the first loss in float64, compared with one process,
#   reveals it. The order of frames does not matter.
#
# Files: [torch_impl/module.py](../torch_impl/module.py),
# [torch_impl/commands/train/data.py](../torch_impl/commands/train/data.py),
# [torch_impl/commands/train/training.py](../torch_impl/commands/train/training.py).
#
# Next: [notebook 8, your own kernel and cluster](08_your_own_kernel_and_cluster.ipynb).
