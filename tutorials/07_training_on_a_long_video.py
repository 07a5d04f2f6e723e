# %% [markdown]
# # 7. Training on a long video
#
# A loader gives one rank of four the wrong frames. Nothing fails: the shapes are right, the loss
# falls step by step, and only the finished model answers a quarter of the questions badly. On
# hundreds of GPUs, that is found out after days; in this notebook, from the first loss.
#
# **You will be able to**
#
# - train a PyTorch model on a video that is sharded over processes, and show that the training
#   equals that of one process,
# - explain the first loss, and why a model that is to see long videos begins with short ones,
# - detect a wrong shard with one step, or without any.
#
# **Prerequisites.** [Notebook 4](04_real_ranks_with_mpi.ipynb) for `%%mpi`, [notebook
# 6](06_forgetting_keys_and_values.ipynb) for the layer.
#
# **Time.** About 35 minutes to read, of which the cells compute for two.

# %%
import numpy as np
import torch
from exercise import check
from figures import training
from torch.nn.functional import cross_entropy

from lvxattn.common.layout import share
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
images = train_images, watch_images, test_images = load_images()
key, shape = (0, TRAIN, 0), (1, 8, 2)  # (seed, purpose, step); 1 clip, 8 frames, 2 questions
clip = make_clips(train_images, key, shape, rank=0, size=1)
asked = clip.asked[0, 0]
assert torch.equal(clip.markers[0, asked], clip.questions[0, 0])
assert len(clip.markers[0].unique(dim=0)) == 8
print(f"question 0 has the marker of frame {asked}; its answer is {clip.answers[0, 0]}")

# %%
training.clip(clip.pictures[0], clip.markers[0], clip.questions[0, 0], asked)

# %% [markdown]
# The question's marker (right) is that of the highlighted frame; its digit is the answer. A small
# model is trained on this task: a frame becomes four visual tokens of 4 × 4 pixels each, the
# question becomes one text token, and two layers of cross-attention are the only connection between
# them ([train/model.py](../torch_impl/commands/train/model.py)).
#
# ## The first loss is that of a guess
#
# A model answers with ten scores, and the loss of a question is $-\log p$ of the right digit. A
# model that knows nothing about the video, and gives every digit the probability 1/10, has a loss
# of $\ln 10 = 2.303$.
#
# **Predict.** The weights are random, and the scores of a question vary with a standard deviation
# of about 0.6. What is the loss before the first step: below 2.303, 2.303, or above?
#
# <details><summary>Reasoning</summary>
#
# Above. Random scores favour some digits, and know nothing of which one is right. That costs: if
# scores $s$ are independent of the answer, the mean loss is the mean of $\ln \sum e^{s} - \bar s$.
# For small deviations $\sigma$ that is about $\ln 10 + \sigma^2 / 2 = 2.303 + 0.18$.
#
# </details>

# %%
short_first = Settings(frames=16, first_frames=2, batch=4, dtype="float32", seed=0)
long_only = Settings(frames=16, first_frames=16, batch=4, dtype="float32", seed=0)
run = Run.begin(long_only, images, Group(None))  # a group of this process only
clips = run.clips(TRAIN, 0, (64, 16, 4))  # 64 clips, 16 frames, 4 questions each
with torch.no_grad():
    scores = run.model(clips).flatten(0, 1)

# %%
answers, others = clips.answers.flatten(), clips.answers.flatten().roll(1)
first, foreign = float(cross_entropy(scores, answers)), float(cross_entropy(scores, others))
guess = np.log(10) + float(scores.var(dim=1, correction=0).mean()) / 2
assert abs(first - guess) < 0.05
assert abs(first - foreign) < 0.05
print(f"loss before training {first:.2f}; ln 10 + variance / 2 = {guess:.2f}")
print(f"with every answer replaced by that to another question: {foreign:.2f}")

# %% [markdown]
# The last line shows that nothing is known yet: with the answers to other questions the loss is as
# good. So a first loss near $\ln 10$ says that the model is set up correctly (a much larger
# one says that the scores are too large). It says nothing about the data.
#
# ## Long clips alone teach nothing at first
#
# The training below begins with clips of 2 frames, and doubles them every 25 steps
# ([options.py](../torch_impl/commands/train/options.py)). Is that necessary? Two models begin with
# the same weights. One is given 16 frames from the first step, the other 2, 4, 8 and 16.
#
# **Predict.** After 100 steps, how many questions about new clips of 16 frames does each model
# answer correctly? Which one has seen more frames?
#
# <details><summary>Reasoning</summary>
#
# The first has seen 16 frames a step, the second 7.5 on average, and yet the second wins. At first
# attention is spread evenly. Over 2 frames the right one has a weight of 1/2, so that its picture
# has an influence on the answer that a gradient can strengthen. Over 16 frames it has 1/16, and the
# rest is the pictures of other frames, which is noise.
#
# </details>


# %%
def trained(settings):
    """Take 100 steps, then answer questions about clips of held-out images."""
    run = Run.begin(settings, images, Group(None))
    for _ in range(100):
        run.step()
    run.look()
    return run


alone, growing = trained(long_only), trained(short_first)

# %% tags=["varies"]
for what, run in (("16 frames from the first step", alone), ("2, 4, 8, then 16 frames", growing)):
    seen, right = 64 * sum(run.curve.column("frames")), run.curve.rows[-1][4]
    print(f"{what:30} {seen:7,.0f} frames seen, then {right:.0%} of the answers are right")
long_losses, losses = (np.array(run.curve.column("loss")) for run in (alone, growing))
assert abs(long_losses[50:].mean() - np.log(10)) < 0.02
assert losses[-10:].mean() < 0.7
print(f"loss of the last ten steps: {long_losses[-10:].mean():.3f} and {losses[-10:].mean():.3f}")

# %% tags=["varies"]
training.lengths(long_losses, losses, growing.curve.column("frames"))

# %% [markdown]
# Long clips alone: the loss falls from 2.5 to $\ln 10$ and stays. The model has learned one thing,
# to guess evenly, and a falling loss looked like progress. The other model has seen less than half
# of the frames. (The plateau ends at some time: with 16 frames after 120 steps or so, with 64
# frames not within 150.)
#
# Attention shows the difference. `find_needles` returns the weight of every frame for every
# question:

# %% tags=["varies"]
from lvxattn.torch_impl.commands.train.model import find_needles

one_clip = alone.clips(TRAIN, 0, (1, 16, 64))  # 64 questions about one clip of 16 frames
weights = []
for run in (alone, growing):
    _, needles = find_needles(run.model, one_clip)
    weights.append(np.mean([needle.weights[needle.frame] for needle in needles]))
assert weights[0] < 0.15
assert weights[1] > 0.5
print(f"weight of the right frame: {weights[0]:.2f} and {weights[1]:.2f}; 1/16 = 0.06")

# %% [markdown]
# <div class="alert alert-info">
#
# **Takeaway.** The first loss is that of guessing, $\ln 10 + \sigma^2/2$, whatever the data. A loss
# that falls to $\ln 10$ and stays there has learned to guess. Begin with short clips: attention has
# to find the right frame by chance before it can learn to find it.
#
# </div>
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
held = [part.pictures.shape[1] for part in parts]
assert held == [3, 3, 3, 2]
assert torch.equal(torch.cat([part.pictures for part in parts], dim=1), whole.pictures)
print("frames:", held, "- put together, they are the clip of one process")

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


# %% tags=["check", "hide-input"]
def try_share(lengths, seed):
    """Compare the parts of ranks with so many questions, and their gradients."""
    n, where = sum(lengths), f"{lengths} questions on {len(lengths)} ranks: "
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, 10, generator=rng, dtype=torch.float64, requires_grad=True)
    answers = torch.randint(10, (n,), generator=rng)
    cuts = list(zip(scores.split(lengths), answers.split(lengths), strict=True))
    parts = [loss_share(*cut, n) for cut in cuts]
    for rank, (part, (mine, its)) in enumerate(zip(parts, cuts, strict=True)):
        right = cross_entropy(mine, its, reduction="sum").item() / n
        which = f"{where}the part of rank {rank}, with {len(its)} of {n} questions, is "
        assert isinstance(part, torch.Tensor), f"{which}not a tensor, so there is no gradient"
        assert abs(part.item() - right) < 1e-12, f"{which}{part.item():.4f}, expected {right:.4f}"
    assert sum(parts).requires_grad, f"{where}the loss has no gradient"
    (found,) = torch.autograd.grad(sum(parts), scores, retain_graph=True)
    (right,) = torch.autograd.grad(cross_entropy(scores, answers), scores)
    assert torch.allclose(found, right, rtol=0, atol=1e-12), f"{where}the gradient is wrong"


with check("the parts and their gradients sum to those of one process, for any shards"):
    for seed, lengths in enumerate(([3, 3, 3, 2], [11, 0, 0, 0], [1, 0, 8, 2], [2, 5], [6])):
        try_share(lengths, seed)

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
from lvxattn.torch_impl import CrossAttention

torch.manual_seed(0)
layer = CrossAttention(64, num_heads=8, num_kv_heads=2, kv_dim=48, dtype=torch.float64)
text = torch.randn(1, 10, 64, dtype=torch.float64)
video = torch.randn(1, 1003, 48, dtype=torch.float64)
(layer(text, video).square().sum() / text.shape[1]).backward()
one_process = {name: weight.grad.clone() for name, weight in layer.named_parameters()}
layer.zero_grad()

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
# communicates over its own process group, with the backend gloo for CPUs. PyTorch's processes find
# one another through a file.

# %%
# %load_ext lvxattn.mpi_impl.jupyter
import tempfile

meeting = tempfile.TemporaryDirectory()
place, second_place = (f"file://{meeting.name}/{name}" for name in ("first", "second"))

# %%
# %%mpi 4 --take layer,text,video,place --give by_rank
import torch.distributed as dist
from mpi4py import MPI

from lvxattn.torch_impl import shard, sum_gradients

comm = MPI.COMM_WORLD
dist.init_process_group("gloo", place, rank=comm.rank, world_size=comm.size)
x, y = shard(text, axis=1), shard(video, axis=1)  # this rank's shards
(layer(x, y).square().sum() / text.shape[1]).backward()
own = {name: weight.grad.clone() for name, weight in layer.named_parameters()}
sum_gradients(layer)
by_rank = comm.gather((own, {name: weight.grad for name, weight in layer.named_parameters()}))
dist.destroy_process_group()


# %%
def gap(found, name):
    """Return the relative distance of a gradient from that of one process."""
    return float((found[name] - one_process[name]).norm() / one_process[name].norm())


for rank, (own, _) in enumerate(by_rank):
    print(f"rank {rank}: before the sum dW_K has an error of {gap(own, 'k_proj.weight'):.0%}")
assert all(gap(own, name) > 0.1 for own, _ in by_rank for name in one_process)
assert all(gap(summed, name) < 1e-12 for _, summed in by_rank for name in one_process)
print("after the sum no gradient of any rank has an error above 1e-12")

# %% [markdown]
# After the sum all ranks have the same gradient, so their optimizers take the same step, and the
# weights stay equal without being sent. Without the sum, each rank would follow its own partial
# gradient, and the weights would diverge between ranks.
#
# ## Training on four processes
#
# Four processes take the first thirty steps of the training, in float64. Nothing in the training
# loop mentions ranks: `Run.step` makes this rank's part of a batch, computes its part of the loss,
# and sums the gradients ([train/training.py](../torch_impl/commands/train/training.py)). The same
# training is available as `python -m lvxattn.torch_impl train`, under PyTorch's launcher torchrun,
# or as `make train`.

# %%
settings = Settings(frames=8, first_frames=2, batch=4, dtype="float64", seed=0)

# %%
# %%mpi 4 --take second_place,images,settings --give frames,four
import torch.distributed as dist
from mpi4py import MPI

from lvxattn.torch_impl.commands.train.training import Run
from lvxattn.torch_impl.group import Group

comm = MPI.COMM_WORLD
dist.init_process_group("gloo", second_place, rank=comm.rank, world_size=comm.size)
run = Run.begin(settings, images, Group.of(None))  # on all four ranks
for _ in range(30):
    run.step()
frames, four = run.curve.column("frames"), run.curve.column("loss")
dist.destroy_process_group()

# %%
meeting.cleanup()
print(f"{len(four)} steps, from clips of {frames[0]:.0f} frames to {frames[-1]:.0f}")
first_shares = [share(2, rank, 4) for rank in range(4)]
assert len(four) == 30
assert [held.stop - held.start for held in first_shares] == [1, 1, 0, 0]
print("frames by rank, of a clip of 2:", [held.stop - held.start for held in first_shares])

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
in_one = Run.begin(settings, images, Group(None))
for _ in range(30):
    in_one.step()
one = np.array(in_one.curve.column("loss"))
apart = abs(np.array(four) - one) / one
assert apart.max() < 1e-12
print("the losses of one process and of four differ by less than 1e-12, at every step")

# %% [markdown]
# ## The full run
#
# `make train` continues until clips have 1,200 frames, 4,800 visual tokens. Its loss curve is
# [recorded](data/needles.csv). The thirty steps above are its beginning, in float64.

# %%
import csv
from pathlib import Path

full = list(csv.DictReader(Path("data/needles.csv").read_text().splitlines()))
loss = np.array([float(row["loss"]) for row in full])
held_out = [float(row["held_out"]) for row in full if row["held_out"]]
assert full[-1]["frames"] == "1200"
assert held_out[-1] > 0.95
assert max(abs(loss[:30] / one - 1)) < 0.01  # float32 beside float64
print(f"{len(full)} steps; {held_out[-1]:.1%} of the answers about 1,200 frames are right")

# %%
training.one_and_four(one, four, full)

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
# <div class="alert alert-info">
#
# **Takeaway.** Each rank computes its part of the loss, divided by all ranks' questions; one
# all-reduce sums the gradients. Then training on four processes is training on one, at every step,
# up to rounding.
#
# </div>
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
from lvxattn.plan import messages, planned

sent = {}
for schedule in ("lv-xattn", "ring"):
    layout = planned((4, 4, 64, 32), (4, 4, 4800, 32), 4, dtype="float32", schedule=schedule)
    passes = [messages(layout, rank, backward=b) for rank in range(4) for b in (False, True)]
    sent[schedule] = 2 * sum(message.nbytes for sent in passes for message in sent)  # two layers
    print(f"{schedule:9} {sent[schedule] / 1e6:6.1f} MB per step, all ranks together")
assert round(sent["ring"] / sent["lv-xattn"]) == 88
print(f"ratio     {sent['ring'] / sent['lv-xattn']:6.1f}")

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

# %% tags=["subject"]
from dataclasses import replace


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
correct = losses_of(lambda clips: clips)
gaps = {name: abs(found - correct) / correct for name, found in curves.items()}

# %% tags=["varies"]
assert gaps["reordered"].max() < 1e-9
print(f"correct    first loss {correct[0]:.12f}, mean of the last ten {correct[-10:].mean():.2f}")
for name in ("dropped", "one_late"):
    found, end = curves[name], curves[name][-10:].mean()
    assert gaps[name][0] > 1e-5  # at the first step
    assert end > 1.1 * correct[-10:].mean()  # at the end
    assert end < 0.9 * found[:10].mean()  # but it decreases
    print(f"{name:10} first loss {found[0]:.12f}, mean of the last ten {end:.2f}")
print("reordered  equal to the correct one at all 50 steps, up to 1e-9")

# %% tags=["varies"]
training.wrong_shards(correct, curves, gaps)

# %% [markdown]
# Left: the wrong curves decrease too, to a higher loss, which is not noticeable without the correct
# curve. Right: the first loss, before any training, already distinguishes them. All first losses
# are those of a guess, as above, and nearly alike. But their last digits depend on every frame: the
# error of correct shards is due to rounding, that of wrong ones is many orders of magnitude larger.
# So a sharded loader can be tested with one step in float64, compared with one process.
#
# ## When the order of frames matters
#
# `reordered` did no harm, because a frame was found by its marker, wherever it was. Many models add
# a *temporal position* to each frame's tokens: its number in the video. Then two loaders that
# deliver the same frames in another order differ in one thing: whether the number travels with the
# frame, or is counted on each rank from where its shard is supposed to begin.
#
# To see it, let the marker be the frame's number in binary, and let questions ask for "frame 3":


# %%
def numbered(clips):
    """Replace the markers by the numbers of the frames, counted in the order of the keys."""
    bits = torch.arange(clips.shape[1])[:, None] >> torch.arange(16) & 1
    numbers = (2 * bits - 1).to(clips.markers.dtype)  # (frames, 16)
    markers = numbers.expand_as(clips.markers)
    return replace(clips, markers=markers, questions=numbers[clips.asked])


# %% [markdown]
# **Predict.** `reordered` is applied after `numbered`, so that numbers move with their frames, and
# before it, so that they are counted in the wrong order. Which one changes the first loss?
#
# <details><summary>Reasoning</summary>
#
# The second. In the first the same pairs of picture and number are keys, in another order. In the
# second frame 0's picture gets the number 2: attention is independent of the order of its keys, but
# the position is part of a key, and it is wrong.
#
# </details>

# %%
right_first = losses_of(numbered, steps=1)[0]
travelling = losses_of(lambda clips: reordered(numbered(clips)), steps=1)[0]
counted = losses_of(lambda clips: numbered(reordered(clips)), steps=1)[0]
errors = [abs(found / right_first - 1) for found in (travelling, counted)]
assert errors[0] < 1e-12
assert errors[1] > 1e-5
print("numbers travel with their frames: relative error of the first loss below 1e-12")
print(f"numbers are counted by place:     {errors[1]:.0e}")

# %% [markdown]
# Llama 3.2 Vision gives the keys of its cross-attention no position in time, so the order of its
# frames does not matter. mPLUG-Owl3 rotates keys by the position of their image in the text
# ([models/hyper_attention.py](../torch_impl/models/hyper_attention.py)), so there it does: a rank
# has to be told the positions of its own images, or the number of its first frame,
# `share(frames, rank, P).start`. Where positions are learned or rotary makes no difference.
#
# ### Exercise 2: a check without training
#
# Shards can also be checked before a run. Given the markers (1, f, 16) of every rank and the number
# of frames of the clip, return how many of its frames no rank holds, and how many frames are held
# more than once, by several ranks or by one. A marker identifies its frame.


# %% tags=["exercise"]
def audit(markers_by_rank, frames):
    """Return (missing, duplicates)."""
    raise NotImplementedError("audit is not implemented")


# %% tags=["check", "hide-input"]
def try_audit(what, shares, frames, right):
    """Audit ranks that hold these frames of a clip."""
    codes = [n + 1 if n % 2 else 256 * (n + 1) for n in range(frames)]  # alike in half of the bits
    bits = torch.tensor(codes)[:, None] >> torch.arange(16) & 1
    markers = (2.0 * bits - 1)[None]  # (1, frames, 16)
    found = audit([markers[:, list(mine)] for mine in shares], frames)
    said = (
        f"{frames} frames on {len(shares)} ranks, {what}: expected (missing, duplicates) = {right}"
    )
    assert tuple(map(int, found)) == right, f"{said}, got {tuple(map(int, found))}"


with check("missing and duplicate frames are detected", hide="parts whole held"):
    thirds = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    try_audit("all correct", thirds, 11, (0, 0))
    try_audit("rank 2 holds nothing", [*thirds[:2], [], thirds[3]], 11, (3, 0))
    try_audit("all hold what rank 0 should", [thirds[0]] * 4, 11, (8, 3))
    try_audit("ranks 1 and 2 share a frame", [*thirds[:2], [5, 6, 7, 8], thirds[3]], 11, (0, 1))
    try_audit("ranks 0 and 3 share a frame", [*thirds[:3], [9, 10, 0]], 11, (0, 1))
    try_audit("rank 1 holds a frame twice", [[0, 1], [2, 3, 3], [4]], 5, (0, 1))
    try_audit("rank 1 starts one early", [[0, 1, 2], [2, 3, 4]], 6, (1, 1))
    try_audit("a frame on three ranks", [[0, 1], [0, 2], [0, 3]], 4, (0, 1))
    try_audit("all correct", [range(40), range(40, 77)], 77, (0, 0))

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
# <div class="alert alert-info">
#
# **Takeaways.** A wrong shard raises no exception, and its loss falls. The first loss in float64
# reveals it: it differs from that of one process by rounding, or by many orders of magnitude more.
#
# - The order of keys does not matter, but a temporal position is part of a key: it has to be the
#   frame's own, wherever the frame is held.
# - The first loss is that of guessing, training on four processes equals training on one, and a
#   model that begins with short clips finds one frame among 1,200.
#
# </div>
#
# Files: [torch_impl/module.py](../torch_impl/module.py),
# [torch_impl/commands/train/data.py](../torch_impl/commands/train/data.py),
# [torch_impl/commands/train/training.py](../torch_impl/commands/train/training.py).
#
# Next: [notebook 8, your own kernel and cluster](08_your_own_kernel_and_cluster.ipynb).
