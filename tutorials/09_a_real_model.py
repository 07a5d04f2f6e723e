# %% [markdown]
# # 9. A real model
#
# A layer of cross-attention became 75 times as fast in a measurement of this project, and the model
# around such layers 10 times, or 3. And a distributed model that attends by a wrong mask can pass
# every comparison of logits, loss and generated tokens, to the last bit. Both have simple reasons,
# which are seen best in a real model: here Llama 3.2 Vision.
#
# **You will be able to**
#
# - spread the frames of a Llama 3.2 Vision over ranks without a change to its code, and show that
#   logits, gradients and generated tokens are those of one process;
# - say what travels at each of its layers, to the byte, and where the time of a step goes;
# - recognise wrong masks and positions, and checks that cannot see them;
# - predict how much faster a whole model becomes, from a few measured numbers.
#
# **Prerequisites.** [Notebook 6](06_forgetting_keys_and_values.ipynb) for layers of
# cross-attention, [notebook 7](07_training_on_a_long_video.ipynb) for gradients on ranks.
#
# **Time.** About 40 minutes.

# %%
# %load_ext torch_cell
import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from exercise import check
from figures import real_model

from lvxattn.common.layout import share
from lvxattn.plan import messages, planned

RESULTS = Path("../benchmarks/results")

# %% [markdown]
# `%%torch 2` runs a cell on two ranks of `torch.distributed`, as `%%mpi` does over MPI
# ([notebook 4](04_real_ranks_with_mpi.ipynb)): in new processes, of which `--give` brings variables
# of rank 0 here. The ranks are forks of one process, which imports PyTorch and transformers in the
# background ([torch_cell.py](torch_cell.py)); the first of these cells waits for it.
#
# ## A Llama 3.2 Vision
#
# The class is `MllamaForConditionalGeneration` of transformers, in a size that a CPU computes in
# moments and with random weights ([llama3v.py](../torch_impl/commands/model/llama3v.py)). The batch
# is one video of 16 frames between tokens of text ([tiny_llama.py](tiny_llama.py)).

# %%
# %%torch 1
from tiny_llama import tiny_llama

model, batch = tiny_llama(frames=16, text_tokens=24)
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
for n, layer in enumerate(model.model.language_model.layers):
    print(f"layer {n}: {type(layer).__name__}")
for name in ("input_ids", "pixel_values", "cross_attention_mask"):
    print(f"{name:21} {tuple(batch[name].shape)}")
pixels = [batch[x] for x in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
print("features             ", tuple(model.model.vision_model(*pixels)[0].shape))

# %% [markdown]
# The vision tower turns each frame into 2 tiles of 17 features; two of four layers of the language
# model attend to all 544 of them. (In the model of 11 billion parameters, eight of 40 layers attend
# to 6,404 for each frame.) `cross_attention_mask` says for each token and tile whether the token
# may attend to it: here, to the frames before it.
#
# A layer of cross-attention adds its result times $\tanh(\mathrm{gate})$. In a new model all gates
# are 0; `tiny_llama` sets them to 0.5. What closed gates do to a check is seen below.
#
# ## Two ranks
#
# `distribute` changes a model in place so that its frames are spread over ranks, and `inputs` cuts
# a batch. Here every rank has the whole text and 8 of the 16 frames. Each encodes its own frames
# and makes their keys and values; attention is joined by a merge of the ranks' results.
#
# **Predict.** The model computes in float32, where a single operation errs by up to $6 \cdot
# 10^{-8}$, relative. How far are logits on two ranks from those of one process, and how would you
# show that this is rounding and not a small bug?
#
# <details><summary>Reasoning</summary>
#
# The errors of many operations partly add up and partly cancel: a few $10^{-7}$. Compute the same
# model in float64 as well. If one process in float32 is as far from that as two ranks are, then the
# ranks have added nothing but rounding.
#
# </details>

# %% tags=["subject", "varies"]
# %%torch 2 --give errors
import copy

from tiny_llama import as_float64, error, gradient_errors, tiny_llama

from lvxattn.torch_impl.models import distribute

model, batch = tiny_llama()
alone = copy.deepcopy(model)
wanted = alone(**batch)  # all of it in this process
wanted.loss.backward()

spread = distribute(model)
local = spread.inputs(**batch)  # my frames, and the whole text
got = model(**local)
got.loss.backward()
spread.average_gradients()
print("my frames:", local["pixel_values"].shape[1], " my tokens:", local["input_ids"].shape[1])

exact, wide = as_float64(copy.deepcopy(alone), batch)
exact.zero_grad()
best = exact(**wide)
best.loss.backward()
errors = {
    "two ranks, from one process": (got.logits, wanted.logits, model, alone),
    "one process, from float64": (wanted.logits, best.logits, alone, exact),
    "two ranks, from float64": (got.logits, best.logits, model, exact),
}
for what, (a, b, x, y) in errors.items():
    errors[what] = error(a, b), gradient_errors(x, y)
    print(f"{what:28} logits {errors[what][0]:.0e}, gradients {max(errors[what][1].values()):.0e}")

# %%
logits, gradients = errors["two ranks, from one process"]
rounding = errors["one process, from float64"]
assert logits < 4 * rounding[0]
assert max(gradients.values()) < 4 * max(rounding[1].values())
print(f"no gradient of {len(gradients)} is off by over 4 times the worst of one process")
assert len(gradients) == 100

# %% [markdown]
# `average_gradients` is an all-reduce, as `DistributedDataParallel` does, which can be used in its
# place. In notebook 7 gradients had to be summed; here they are averaged. The text's parameters
# have the same, whole gradient on every rank, so that their average is right. A key's gradient
# exists on one rank only, and would become half; so `distribute` multiplies the gradients of keys
# and values by the number of ranks beforehand, and one rule serves all parameters.
#
# <div class="alert alert-info">
#
# **Takeaway.** To compare a distributed model with one process, measure what rounding does: the
# same model in a wider type is the ruler. An error of $10^{-6}$ says nothing by itself. (`python -m
# lvxattn.torch_impl model --check` compares a model in this way.)
#
# </div>
#
# ## Generating
#
# `generate` calls the model once for the prompt and once for each further token, with a cache of
# keys and values.
#
# **Predict.** How many keys has the cache of a layer of cross-attention on each rank? And what
# travels when a token is generated?
#
# <details><summary>Reasoning</summary>
#
# Those of its own frames: 8 · 34 = 272 of 544. Each rank attends from the new token to its own
# keys; the result of one row travels, and no key.
#
# </details>

# %%
# %%torch 2 --give tokens,cached
from tiny_llama import generate, tiny_llama

from lvxattn.torch_impl.models import distribute

model, batch = tiny_llama()
prompt = {name: x for name, x in batch.items() if name != "labels"}
ways = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True}}
tokens = {way: [generate(model, prompt, **options)[0]] for way, options in ways.items()}
local = distribute(model).inputs(**prompt)
for way, options in ways.items():
    found, cached = generate(model, local, **options)
    tokens[way].append(found)
print("keys in my caches, by layer:", cached)

# %%
for way, (one_process, two_ranks) in tokens.items():
    print(f"{way:8} {two_ranks}")
    assert one_process == two_ranks
assert (cached[1], cached[3]) == (272, 272)
print("the same tokens, with half of the keys on each rank")

# %% [markdown]
# Layers 0 and 2 are self-attention, whose cache has the 31 tokens that came before the last one.
# Sampling gives the same tokens because all ranks draw the same random numbers. With a seed of its
# own each rank would continue in its own way.
#
# ## What travels at each layer
#
# A long text can be sharded, too: `text="sharded"`. Each rank then has 12 of the 24 tokens, and
# layers of self-attention need a schedule as well: they gather queries and results, which for a
# short text is fastest. In the layers of cross-attention a schedule can be chosen. The meter counts
# what attention sends; hooks note its count before each layer.

# %% tags=["subject"]
# %%torch 2 --give sent,steps
from itertools import pairwise

from tiny_llama import tiny_llama

from lvxattn.torch_impl import Meter
from lvxattn.torch_impl.models import distribute


def measure(schedule, frames):
    """Return the bytes sent in the forward of each layer, and in a whole step."""
    model, batch = tiny_llama(frames)
    spread = distribute(model, text="sharded", schedule=schedule)
    local, spread.meter, count = spread.inputs(**batch), Meter(), []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda *_: count.append(spread.meter.bytes))
    loss = model(**local).loss
    count.append(spread.meter.bytes)
    loss.backward()
    return [b - a for a, b in pairwise(count)], spread.meter.bytes


cases = [(schedule, frames) for schedule in ("lv-xattn", "ring") for frames in (16, 32)]
found = {case: measure(*case) for case in cases}
sent = {case: by_layer for case, (by_layer, _) in found.items()}
steps = {case: step for case, (_, step) in found.items()}

# %% [markdown]
# **Predict.** There are 4 heads of 16 numbers, which share 2 heads of keys and values; float32. How
# many bytes does a rank send in the forward of layer 1, with LV-XAttn and with Ring Attention, for
# 16 frames? And for 32?
#
# <details><summary>Reasoning</summary>
#
# LV-XAttn sends its 12 queries, 12 · 4 · 16 · 4 = 3,072 bytes, and results of the other's 12: as
# much, and two numbers for each row and head, the maximum and the sum of the softmax, 384: 6,528
# together. Ring Attention sends 272 keys and values, 2 · 272 · 2 · 16 · 4 = 69,632. With 32 frames
# the first stays, and the second doubles.
#
# </details>
#
# The planner needs only the shapes. In PyTorch each message of a backward carries 8 more bytes, a
# number that identifies the pass: `stamp_nbytes`. A mask would travel with Ring Attention's keys;
# here a rule takes its place, which every rank knows.


# %%
def plan(schedule, keys):
    """Return the bytes that a rank sends in a layer's forward and backward."""
    layout = planned((1, 4, 24, 16), (1, 2, keys, 16), 2, dtype="float32", schedule=schedule)
    layout = replace(layout, stamp_nbytes=8)
    return [sum(m.nbytes for m in messages(layout, 0, backward=b)) for b in (False, True)]


for (schedule, frames), by_layer in sent.items():
    own, cross = plan("gather", 24), plan(schedule, 34 * frames)
    print(f"{schedule:8} {frames} frames, by layer: {by_layer}")
    assert by_layer == [own[0], cross[0]] * 2
    assert steps[schedule, frames] == 2 * sum(own) + 2 * sum(cross)
print("all as planned, to the byte, and the backwards, too")

# %% tags=["hide-input"]
real_model.bytes_by_layer(sent)

# %% [markdown]
# With LV-XAttn a layer of cross-attention sends as much as one of self-attention, for a video of
# any length. The text is short here, and still the ring's bars are 11 and 21 times as high.
#
# <div class="alert alert-info">
#
# **Takeaway.** With LV-XAttn the bytes of a layer depend on the text alone, and follow from shapes
# alone: count them before a run, and compare the meter with the plan in a test.
#
# </div>
#
# ## Where a step's time goes
#
# Hooks around the tower, the language model and its cross-attention take the time of a forward's
# parts ([work.py](../torch_impl/commands/model/work.py)).
#
# **Predict.** The text is replicated again. Which of a step's parts does a second rank halve?
#
# <details><summary>Reasoning</summary>
#
# The tower, and attention to keys: a rank has half of the frames. Not the text's own layers, which
# each rank computes in full, nor the optimizer, which updates all weights on each rank. Of the
# backward, the share that belongs to frames.
#
# </details>

# %%
# %%torch 2 --give seconds
import copy

import torch
from tiny_llama import LLAMA, quickest_step, tiny_llama

from lvxattn.torch_impl.commands.model.work import Work
from lvxattn.torch_impl.models import distribute

cpu, (model, batch) = torch.device("cpu"), tiny_llama(frames=64, text_tokens=64)
alone = quickest_step(Work(copy.deepcopy(model), LLAMA, batch, cpu))
spread = distribute(model)
mine = quickest_step(Work(model, LLAMA, spread.inputs(**batch), cpu, spread))
both = spread.group.allgather(mine)
seconds = {"one process": alone, "rank 0": both[0], "rank 1": both[1]}

# %% tags=["varies"]
for who, found in seconds.items():
    parts = [found[part] for part in ("tower", "text", "cross", "backward", "update")]
    assert abs(sum(parts) - found["total"]) < 1e-9
    print(f"{who:12} {1e3 * found['total']:6.0f} ms, tower {found['tower'] / found['total']:.0%}, "
          f"waiting {found['waiting'] / found['total']:.0%}")  # fmt: skip

# %% tags=["hide-input", "varies"]
real_model.parts_of_a_step(seconds)

# %% [markdown]
# The picture is of one machine with two cores, on which other programs ran. The tower and the
# backward became shorter. `cross` became longer: with blocks as small as these, an exchange in
# Python costs more than half of the arithmetic, and a rank waits whenever the other one has no
# core, there, in the backward, and in `update` for the average of gradients. The same table for a
# model of 81 million parameters on four ranks is in
# [training](../docs/training.md#run-a-whole-model); `python -m lvxattn.torch_impl model`, under
# torchrun, makes it for your machine. What holds everywhere: parts that are computed on every rank
# do not become faster with more ranks. We come back to that.
#
# ## A mask that is right on every rank, and wrong
#
# Mllama has a rule for a token that may attend to no frame at all, as the first one in our text:
# its row of the mask is reset, so that it attends to all of them. (A softmax over nothing would be
# NaN. The layer's MLP skips such a row, its attention does not.) What does the rule make of a
# rank's own part of the mask? The next cell calls the model's function with it.

# %%
# %%torch 2 --give whole,local
import torch
from tiny_llama import tiny_llama
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from lvxattn.torch_impl.group import Group


def seen(mask):
    """Return which token attends to which frame, in its first tile: what is not -inf, nearly."""
    added, _ = _prepare_cross_attention_mask(mask, 1, torch.float32)
    return (added[0, 0] == 0)[:, ::2]


ranks, mask = Group.of(None), tiny_llama()[1]["cross_attention_mask"]
whole = seen(mask).numpy()
local = torch.cat(ranks.allgather(seen(mask.chunk(2, dim=2)[ranks.rank])), 1).numpy()

# %% [markdown]
# **Predict.** Which rows of the two masks differ?
#
# <details><summary>Reasoning</summary>
#
# Those that see frames of rank 0 only: on rank 1 nothing is left of them, and the rule lets them
# see all of rank 1's frames. These are frames that come later in the text.
#
# </details>

# %%
rows = np.flatnonzero((whole != local).any(1))
print("rows that differ:", rows.tolist())
assert rows.tolist() == [1, 2, 3, 4, 5, 6]
assert (local[rows, 8:] & ~whole[rows, 8:]).all()

# %% tags=["hide-input"]
real_model.local_masks(whole, local)

# %% [markdown]
# Nothing is wrong with either rank's mask for a model that has these 8 frames only. Whether a row
# is empty is a question about all ranks' frames.
#
# ### Exercise 1: a rank's mask
#
# Write the mask of a rank's own frames, so that all ranks' parts together are the model's mask.
# `mask` (tokens, frames) of bool is the whole one, before the rule; `mine` is the range of the
# rank's frames. A token that may attend to no frame of the video attends to all.


# %% tags=["exercise"]
def mask_of_rank(mask, mine):
    """Return which token attends to which of this rank's frames: (tokens, len(mine))."""
    part = mask[:, mine.start : mine.stop]
    return part | ~part.any(axis=1, keepdims=True)


# %% tags=["check", "hide-input"]
def check_masks(answer):
    """Compare a function's masks with the model's, for several numbers of ranks."""
    rng = np.random.default_rng(0)
    for P, tokens, frames in ((1, 6, 5), (2, 9, 8), (3, 7, 4), (4, 8, 3)):
        mask = rng.random((tokens, frames)) < 0.3
        mask[0], mask[1], mask[2], mask[-1] = False, np.arange(frames) == 0, False, True
        right = mask | ~mask.any(axis=1, keepdims=True)
        for rank in range(P):
            mine = share(frames, rank, P)
            mine = range(mine.start, mine.stop)
            where = f"{P} ranks, rank {rank} with {len(mine)} of {frames} frames"
            got, expected = np.asarray(answer(mask.copy(), mine)), right[:, mine.start : mine.stop]
            shapes = f"expected shape {expected.shape}, got {got.shape}"
            assert got.shape == expected.shape, f"{where}: {shapes}"
            assert got.dtype == bool, f"{where}: expected bool, got {got.dtype}"
            for row in np.flatnonzero((got != expected).any(axis=1)):
                seen = [mine[j] for j in np.flatnonzero(got[row])]
                told = [mine[j] for j in np.flatnonzero(expected[row])]
                raise AssertionError(
                    f"{where}: token {row} may attend to {mask[row].sum()} of all frames; "
                    f"expected that it sees frames {told} here, got {seen}"
                )


with check("the ranks' masks are parts of the model's", hide="whole local rows"):
    check_masks(mask_of_rank)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def mask_of_rank(mask, mine):
#     empty = ~mask.any(axis=1, keepdims=True)  # on all ranks
#     return (mask | empty)[:, mine.start : mine.stop]
# ```
#
# The adapter does the same with a table of tiles that every rank has whole, and a rule that looks a
# key up in it: `table[b, q_index, kv_index // width]`
# ([images.py](../torch_impl/models/images.py)). The table is small; the model's own mask is as
# large as the scores.
#
# </details>

# %% [markdown]
# ## Checks that cannot see it
#
# The next cell plants that fault in the whole model, and another one: a rank whose tokens are
# numbered from 0, for the rotary positions of self-attention. And it computes the first once more
# with closed gates, as a new model has them.
#
# **Predict.** With closed gates, how large is the error of logits?
#
# <details><summary>Reasoning</summary>
#
# Exactly 0: the results of cross-attention are multiplied by $\tanh(0) = 0$ before they are added,
# whatever they are.
#
# </details>

# %% tags=["subject"]
# %%torch 2 --give faults
import torch
from tiny_llama import compare
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask


def masks_by_rank(spread, batch, local):
    """Have each rank make the mask of its own frames with the model's function."""
    adapter, look_up = spread.adapter, spread.adapter.mask
    mine = adapter.mine
    part = batch["cross_attention_mask"][:, :, mine.start : mine.stop]
    added, _ = _prepare_cross_attention_mask(part, 1, torch.float32)

    def mask():
        adapter.table[:, :, 2 * mine.start : 2 * mine.stop] = added[:, 0] == 0  # 2 tiles a frame
        return look_up()

    adapter.mask = mask


def positions_from_0(spread, batch, local):
    """Have each rank number its own tokens."""
    local["position_ids"] = None


faults = {
    "right": compare(),
    "masks by rank": compare(masks_by_rank),
    "positions from 0": compare(positions_from_0, text="sharded"),
    "right, gates closed": compare(gates=0.0),
    "masks by rank, gates closed": compare(masks_by_rank, gates=0.0),
}

# %% tags=["varies"]
print(f"{'':28}  logits     loss   worst gradient     off by 0.1 %")
for what, found in faults.items():
    errors = found["gradients"].values()
    print(f"{what:28} {found['logits']:.0e}  {found['loss']:.0e}   {max(errors):.0e}          "
          f"{sum(x > 1e-3 for x in errors):3} of {len(errors)}")  # fmt: skip
closed = faults["masks by rank, gates closed"]
off = [name for name, x in closed["gradients"].items() if x > 1e-3]
assert faults["right"]["logits"] < 1e-5
assert faults["masks by rank"]["logits"] > 1e-3 < faults["positions from 0"]["logits"]
assert closed["logits"] == closed["loss"] == 0
assert off == ["model.language_model.layers.1.cross_attn_attn_gate"]

# %% [markdown]
# With open gates a comparison of logits finds both faults, at four orders of magnitude above
# rounding. But look at the loss: errors below $10^{-5}$ would pass in any test. It is a mean over
# tokens that have a label. Those that stand for frames have none, and the mask is wrong in their
# rows only, which reach the loss through later self-attention.
#
# With closed gates logits and loss are those of one process, bit for bit, with a wrong mask. 75 of
# 100 parameters, the vision tower and all of the layers of cross-attention but their gates, have a
# gradient of exactly 0 in both runs, and comparing 0 with 0 shows nothing. Of the other 25 a single
# one gives the fault away: the gate of layer 1, whose gradient is a product with what attention
# returned. (That of layer 3 does not: no self-attention follows that would read the wrong rows.) A
# tolerance for all gradients taken together would have hidden it.
#
# Three more of the kind, each of which happened:
#
# - Without a `cross_attention_mask`, transformers takes a missing mask for a causal one, over image
#   keys. One process is then wrong, and the ranks right.
# - In `eager` attention in float64, tokens without a frame are NaN: compare with `sdpa`.
# - Where a parameter's gradient is 0 but for rounding, as for a bias of keys, which a softmax does
#   not see, relative errors are of order 1 and mean nothing.
#
# <div class="alert alert-info">
#
# **Takeaway.** Before you trust a check, break what it checks. Open the gates, compare logits and
# each gradient by itself, count how many are not 0, and plant a fault that must be seen.
#
# </div>
#
# ## The rules of two other models
#
# A mask over shards is a rule: a function of the number of the token and that of the key, both
# counted over all ranks. What is different in other models fits into a few lines.
#
# **mPLUG-Owl3** (arXiv:2408.04840) has no mask in its batch. A token stands for each image in the
# text. A token of the text sees the images before it, and all keys of an image are rotated to the
# position of the image's token. In version 241101 a token sees its own image, too; in version
# 240728 it does not, and keys are one position later. (According to public copies of its code; see
# the module.) A rank that numbered its own images from 0 would rotate them to the wrong places.


# %%
def owl3_rule(ids, image, version):
    """Return which token sees which image, (tokens, images), and the positions of their keys."""
    where = np.flatnonzero(ids == image)
    token = np.arange(len(ids))[:, None]
    if version == 241101:
        return where <= token, where
    return where < token, where + 1


# %% [markdown]
# The project's mPLUG-Owl3 ([owl3.py](../torch_impl/models/owl3.py)) and its adapter for
# OpenFlamingo ([openflamingo.py](../torch_impl/models/openflamingo.py)) return their tables for a
# few texts; positions are read from the angles by which the model rotates.

# %% tags=["hide-input"]
# %%torch 1 --give owl3,flamingo
from types import SimpleNamespace

import torch

from lvxattn.torch_impl.models.hyper_attention import position_of
from lvxattn.torch_impl.models.openflamingo import _Layer
from lvxattn.torch_impl.models.owl3 import Owl3, Owl3Config

image, owl3, flamingo = 31, [], []
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
text = {**sizes, "vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
vision = {**sizes, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
for version in (240728, 241101):
    fused = version == 241101
    model = Owl3(Owl3Config(text, vision, hyper_layers=(2,), fused=fused, image_token_id=image))
    for places in ((1, 4), (0, 1, 2, 8), (3,), (2, 9)):
        ids = torch.full((1, 10), 5)
        ids[0, list(places)] = image
        where = model.find_images(ids, len(places))
        table = model.sees(torch.arange(10), where)[0]
        cos, sin = model._rotation(torch.ones(1), position_of(where, None))
        slowest = torch.atan2(sin, cos)[0, 0, :, 0, 3]  # of four frequencies
        positions = slowest / model.language_model.model.rotary_emb.inv_freq[3]
        owl3.append((version, ids[0].numpy(), table.numpy(), positions.round().long().numpy()))
for S, rows in ((8, ((1, 4), (0, 6), (2, 3))), (11, ((0, 1, 5), (3, 7, 10))), (5, ((2,), (4,)))):
    ids = torch.full((len(rows), S), 5)
    for b, places in enumerate(rows):
        ids[b, list(places)] = image
    whole = SimpleNamespace(text=None, images=len(rows[0]), own_rows=lambda x: x)
    layer = _Layer(SimpleNamespace(only_attend_immediate_media=True), whole)
    table, _ = layer._table(ids[..., None], ids == image, False)
    flamingo.append((ids.numpy(), table.numpy()))
print(f"{len(owl3)} texts of mPLUG-Owl3, {len(flamingo)} batches of OpenFlamingo")

# %%
for version, ids, table, positions in owl3:
    sees, at = owl3_rule(ids, 31, version)
    assert np.array_equal(sees, table)
    assert np.array_equal(at, positions)
print(f"mPLUG-Owl3: {len(owl3)} texts of both versions, the same tables and positions")

# %% [markdown]
# ### Exercise 2: OpenFlamingo's mask
#
# In **OpenFlamingo** (arXiv:2308.01390) a token sees the last image before it only, and the token
# that stands for an image sees that image. Tokens before the first image see none, and the layer
# adds nothing to them.
#
# Write the part of a rank: which tokens see which of its images. `ids` is (B, tokens), equal on all
# ranks; `image` is the token of images; `mine` is the range of the rank's images in each row,
# counted from 0 over all ranks.


# %% tags=["exercise"]
def flamingo_rule(ids, image, mine):
    """Return which token sees which of this rank's images: (B, tokens, len(mine))."""
    raise NotImplementedError("flamingo_rule is not implemented")


# %% tags=["check", "hide-input"]
def check_flamingo(answer, batches=flamingo):
    """Compare a function's tables with the adapter's, for several numbers of ranks."""
    rng = np.random.default_rng(0)
    for texts, table in batches:
        for P, rank in ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
            image, *others = rng.permutation(32)  # another token for images, other text
            ids = np.where(texts == 31, image, rng.choice(others, texts.shape))
            mine = share(table.shape[2], rank, P)
            mine = range(mine.start, mine.stop)
            where = f"{P} ranks, rank {rank} with images {[*mine]} of {table.shape[2]}"
            got, expected = (
                np.asarray(answer(ids.copy(), image, mine)),
                table[..., mine.start : mine.stop],
            )
            shapes = f"expected shape {expected.shape}, got {got.shape}"
            assert got.shape == expected.shape, f"{where}: {shapes}"
            for b, s in np.argwhere((got != expected).any(axis=2)):
                sees, right = ([mine[j] for j in np.flatnonzero(x[b, s])] for x in (got, expected))
                raise AssertionError(
                    f"{where}: row {b}, with images at tokens {np.flatnonzero(ids[b] == image)}: "
                    f"expected that token {s} sees images {right} here, got {sees}"
                )


with check("each token sees the last image before it, on whichever rank", hide="flamingo owl3"):
    check_flamingo(flamingo_rule)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def flamingo_rule(ids, image, mine):
#     number = (ids == image).cumsum(axis=1) - 1  # of the last image so far; -1 before the first
#     return number[:, :, None] == np.arange(mine.start, mine.stop)
# ```
#
# Every rank has all of the text, or at least of its image tokens, and counts from its beginning.
#
# </details>

# %% [markdown]
# ## Why 75 times is 10
#
# Back to the first sentence. Two measurements of this project, on four hosts with shaped links, are
# recorded: a layer by itself ([network.md](../benchmarks/results/network.md)), and training steps
# of whole models ([models.md](../benchmarks/results/models.md)). Each has steps with Ring
# Attention, with LV-XAttn, and without messages, which is all the computing.


# %%
def measured(name, part):
    """Return the results of a benchmark, medians over its rounds: seconds by schedule."""
    found = json.loads((RESULTS / f"{name}.json").read_text())[part]
    for result in found:
        for kind in ("none", "lv-xattn", "ring"):
            turns = result["turns"][kind]
            result[kind] = median(turn.get("total", turn.get("seconds")) for turn in turns)
            result[f"{kind} bytes"] = max(turns[0]["bytes"])
    return found


(layer,), models = measured("network", "slow"), measured("models", "links")
models += measured("models", "texts")

# %%
llama = {r["bits_per_second"] / 1e6: r for r in models
         if r["model"] == "llama3v" and r["text_tokens"] == 64}  # fmt: skip
for name, r in (("a layer, 50 Mbit/s", layer), ("Llama 3-V, 50 Mbit/s", llama[50]),
                ("Llama 3-V, 100 Mbit/s", llama[100])):  # fmt: skip
    print(f"{name:22} computing {r['none']:5.2f} s, Ring {r['ring']:6.2f} s, LV-XAttn "
          f"{r['lv-xattn']:4.2f} s: {r['ring'] / r['lv-xattn']:4.1f} times")  # fmt: skip
assert 70 < layer["ring"] / layer["lv-xattn"] < 80
assert 9 < llama[100]["ring"] / llama[100]["lv-xattn"] < 11

# %% [markdown]
# **Predict.** Suppose that LV-XAttn's messages took no time at all. How many times as fast could
# it be in each row?
#
# <details><summary>Reasoning</summary>
#
# What both compute remains. $103.2 / 1.37$ is 75, which the layer nearly reaches, because its
# messages travel while it computes. For the model at 50 Mbit/s it is $26.5 / 1.39 = 19$, at 100
# Mbit/s $13.8 / 1.12 = 12$.
#
# </details>
#
# This is Amdahl's law: if a share $f$ of a step's time remains whatever is done about the rest, the
# step becomes at most $1 / f$ times as fast. In the layer 1.3 % remain, in the model at 100 Mbit/s
# 8 %. The model has more to compute for each byte that the ring sends:
#
# - The layer has 8 key-value heads of 64. The model has 2 layers of cross-attention with 2 heads of
#   32 (grouped queries), so that keys and values are a quarter, 153 instead of 604 MB a rank.
# - Eight of its ten layers, the MLPs and the loss compute, and send nothing that the video
#   lengthens.
# - A step of training ends with the sum of gradients over ranks, which no schedule of attention
#   touches: with 7.8 million parameters 47 MB, nineteen times what attention sends.
# - A faster link shortens the part that is saved, and not the rest.
#
# ### Exercise 3: a whole step
#
# Predict how many times as fast as with Ring Attention a model's step is with LV-XAttn, in the
# simplest way: nothing overlaps, so that a step takes the time of its computing, of its messages
# and of the sum of gradients. You are given the seconds of computing, the bytes that a rank sends
# with either schedule, the number of parameters, in float32, and the link's rate in bits per
# second. A ring all-reduce of $n$ bytes over $P$ ranks sends $2 n (P - 1) / P$ from each.


# %% tags=["exercise"]
def gain(computing, ring_bytes, lv_bytes, parameters, bits_per_second, P):
    """Return the time of a step with Ring Attention over that with LV-XAttn."""
    return ring_bytes / lv_bytes


# %% tags=["check", "hide-input"]
def check_gain(answer, recorded=llama):
    """Compare a function with the formula, and with the recorded steps of Llama 3-V."""
    for what, computing, ring, lv, parameters, rate, P in (
        ("1 s of computing, 1 s of the ring's messages", 1.0, 1.25e8, 1.25e6, 0, 1e9, 4),
        ("messages alone", 0.0, 6e8, 3e8, 0, 1e9, 4),
        ("a sum of gradients over 4 ranks", 1.0, 4e8, 4e6, 10**7, 1e9, 4),
        ("a sum of gradients over 16 ranks", 1.0, 4e8, 4e6, 10**7, 1e9, 16),
        ("the same at 50 Mbit/s", 1.0, 4e8, 4e6, 10**7, 5e7, 16),
        ("a sum of gradients, and no attention", 1.0, 0.0, 0.0, 10**8, 1e9, 2),
    ):
        same = computing + 8 * 4 * parameters * 2 * (P - 1) / P / rate
        right = (same + 8 * ring / rate) / (same + 8 * lv / rate)
        got = answer(computing, ring, lv, parameters, rate, P)
        said = f"{what}: expected {right:.3f} times, got {got:.3f}"
        assert abs(got - right) < 1e-9 * right, said
    for link, r in recorded.items():
        summed = r["summed"]
        was = (r["ring"] + summed) / (r["lv-xattn"] + summed)
        got = answer(r["none"], r["ring bytes"], r["lv-xattn bytes"], r["parameters"],
                     r["bits_per_second"], r["P"])  # fmt: skip
        said = f"{link:g} Mbit/s: measured {was:.2f}, got {got:.2f}"
        assert abs(got / was - 1) < 0.15, said


with check(
    "the formula, within 15 % of the recorded steps of Llama 3-V",
    hide="layer models llama",
):
    check_gain(gain)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def gain(computing, ring_bytes, lv_bytes, parameters, bits_per_second, P):
#     summed = 2 * 4 * parameters * (P - 1) / P
#     ring, lv = (
#         computing + 8 * (sent + summed) / bits_per_second for sent in (ring_bytes, lv_bytes)
#     )
#     return ring / lv
# ```
#
# From 50 Mbit/s to 1 Gbit/s it gives 3.6, 3.4, 2.9 and 1.8; measured were 3.5, 3.3, 2.8 and 1.6.
#
# </details>

# %% tags=["hide-input"]
rows = [("A  a layer, 50 Mbit/s", layer, 0.0), ("B  Llama 3-V, 50 Mbit/s", llama[50], 0.0),
        ("C  Llama 3-V, 100 Mbit/s", llama[100], 0.0),
        ("D  the same, with the sum of gradients", llama[100], llama[100]["summed"])]  # fmt: skip
real_model.from_layer_to_model(
    [(name, r["none"], more, r["ring"] + more, r["lv-xattn"] + more) for name, r, more in rows],
    [(r["none"] / r["ring"], r["ring"] / r["lv-xattn"]) for r in models],
)

# %% [markdown]
# Left: what a step with Ring Attention consists of; LV-XAttn saves nearly all of the orange. Right:
# every recorded step, with the four of the left in red. The line is Amdahl's bound. Points below it
# have messages of their own that computing does not hide: with 64 tokens of text a layer computes
# too briefly, and its messages cannot travel during another layer, which needs its result.
#
# So 75, 15, 10 and 3 are all true. The paper (arXiv:2502.02406) reports up to 10.6 times for a
# whole Llama 3-V on 16 GPUs. For your own model the question is which share of its step Ring
# Attention spends on keys and values: long videos, short texts, many key-value heads and slow links
# make it large. Below a share of one half, nothing can double the speed.

# %%
for r in models:
    share_left, times = r["none"] / r["ring"], r["ring"] / r["lv-xattn"]
    assert times < 1 / share_left
least = min((r["none"] / r["ring"], r["ring"] / r["lv-xattn"]) for r in models)
most = max((r["none"] / r["ring"], r["ring"] / r["lv-xattn"]) for r in models)
print(f"{len(models)} steps, none above its bound: from {least[1]:.0f} times, where {least[0]:.0%} "
      f"remain, to {most[1]:.1f} times, where {most[0]:.0%} do")  # fmt: skip

# %% [markdown]
# <div class="alert alert-info">
#
# **Takeaways.** What a real model adds to the layers of the other notebooks:
#
# - `distribute` spreads the frames of a Llama 3.2 Vision over ranks; logits, gradients and tokens
#   are those of one process up to rounding, which a run in a wider type measures.
# - What travels depends on the text, and is known beforehand to the byte. What every rank computes
#   in full does not become faster.
# - Whether a row of a mask is empty, which image is the last one, where a token is: all are
#   questions about the whole, not about a rank's part.
# - Behind closed gates every mask passes. Plant a fault before you trust a check.
# - A model gains at most 1 / the share of its step that is not keys and values.
#
# </div>
#
# Files: [torch_impl/models](../torch_impl/models/distribute.py),
# [torch_impl/models/mllama.py](../torch_impl/models/mllama.py),
# [torch_impl/commands/model](../torch_impl/commands/model/program.py),
# [benchmarks/models.py](../benchmarks/models.py). More about training, and what is refused:
# [docs/training.md](../docs/training.md).
#
# This is the last notebook; [notebook 1](01_merging_softmax.ipynb) is about the merge, the basis of
# all of them.
