# %% [markdown]
# # 6. Forgetting keys and values: activation checkpointing
#
# You will learn to compute exactly how many bytes cross-attention layers store between forward and
# backward, and how many more frames fit if keys and values are recomputed instead of stored.
#
# Prerequisites: [notebook 5](05_going_backward.ipynb) for the gradients. Time: about 25 minutes.

# %%
import json
import sys
from dataclasses import fields
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import torch
from exercise import check

sys.path.append("../benchmarks")
from activations import Layers, saved_bytes

from lvxattn.draw.rotation import COLOURS, INK
from lvxattn.plan import MACHINES, MODELS, memory, most_frames
from lvxattn.reference import (
    Saved,
    cross_attention_layer,
    cross_attention_layer_backward,
    run_ranks,
)
from lvxattn.reference.recompute import project, project_backward

MiB, GB = 2**20, 1e9

# %% [markdown]
# ## What layers store
#
# A cross-attention layer reads text features $x$, one row of $E$ numbers for each of $S_Q$ text
# tokens, and visual features $y$, one row for each of $S_{KV}$ visual tokens; both have the same
# width $E$. It projects them to $H$ query heads and $H_{KV}$ key-value heads, all of dimension $D$:
#
# $$q = x W_Q \qquad k = y W_K \qquad v = y W_V \qquad (out, lse) = \text{attention}(q, k, v)$$
#
# Its backward needs $q, k, v, out$ and $lse$ ([notebook 5](05_going_backward.ipynb)), and $x$ and
# $y$ for the gradients of the weights: $dW_K = y^\top dk$. These arrays stay in memory from forward
# to backward, and limit the length of the videos that a model can be trained on.
#
# Below are eight layers of width $E = 256$, with $H = 4$ heads of $D = 64$ that share one key-value
# head. They all read the same $y$.


# %%
def eight_layers(recompute_kv):
    """Return layers with the same weights whether keys and values are stored or recomputed."""
    torch.manual_seed(0)
    return Layers(8, 256, 4, num_kv_heads=1, recompute_kv=recompute_kv)


x = torch.randn(1, 256, 256, requires_grad=True)  # 256 text tokens
y = torch.randn(1, 4096, 256, requires_grad=True)  # 4,096 visual tokens

# %% [markdown]
# **Predict.** Numbers are float32, 4 bytes each. How many MiB of keys and values do the eight
# layers store? How many MiB of $y$?
#
# <details><summary>Reasoning</summary>
#
# $k$ has one row of 64 numbers for each visual token: 4,096 · 64 · 4 bytes are 1 MiB, and $v$ is as
# large: 2 MiB per layer, 16 MiB in total. $y$ has 4,096 · 256 · 4 bytes = 4 MiB, stored once,
# because it is the same tensor in every layer.
#
# </details>
#
# `saved_bytes` runs a forward, records which tensors autograd saves for the backward, and counts
# every piece of memory once.

# %%
kept = saved_bytes(eight_layers(recompute_kv=False), x, y)
for what, nbytes in kept.items():
    print(f"{what:9}{nbytes / MiB:7.2f} MiB")
assert kept["k"] + kept["v"] == 16 * MiB
assert kept["features"] == 4 * MiB
assert kept["k"] + kept["v"] > 0.6 * sum(kept.values())

# %% [markdown]
# `features` is $y$; `x`, `q`, `out` and `lse` belong to the text, which is short. Keys and values
# are 16 of 26 MiB, and every additional layer adds its own.
#
# ## Recomputing keys and values
#
# $k$ and $v$ are one matrix product each from $y$, and $y$ is stored in any case. So a layer can
# discard them and recompute them in its backward (activation checkpointing; arXiv:2502.02406). The
# layer calls a function `make_kv(y)`, which returns $k$ and $v$, in both passes, and needs no other
# knowledge of the projections. In the reference, a class contains what it stores between the
# passes:

# %%
print("a layer stores:", ", ".join(field.name for field in fields(Saved)))
assert [field.name for field in fields(Saved)] == ["q", "y", "out", "lse", "forms"]

# %% [markdown]
# `forms` are the shapes of $k$ and $v$, which the recomputation has to reproduce. The modules above
# also recompute $q$ from $x$, which the rest of a model stores in any case.
#
# **Predict.** Which fraction of the bytes above do the eight layers together still store?
#
# <details><summary>Reasoning</summary>
#
# Without $q$, $k$ and $v$, which are 2 + 8 + 8 of 26 MiB, 8 MiB are left: 31 %.
#
# </details>

# %%
again = saved_bytes(eight_layers(recompute_kv=True), x, y)
share = sum(again.values()) / sum(kept.values())
print(f"{share:.0%} of the bytes: {', '.join(again)}")
assert not {"q", "k", "v"} & set(again)
assert again["features"] == kept["features"]
assert round(share, 2) == 0.31

# %% tags=["hide-input"]
shades = dict(zip(("features", "k", "v", "x", "q", "out", "lse"), COLOURS, strict=False))
figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
for row, counted in ((1, kept), (0, again)):
    left = 0.0
    for what in (name for name in shades if counted.get(name, 0) > MiB / 2):
        width = counted[what] / MiB
        axes.barh(row, width, left=left, color=shades[what], edgecolor="white", height=0.7)
        label = "y" if what == "features" else what
        axes.text(left + width / 2, row, label, ha="center", va="center", color="white", size=12)
        left += width
    axes.text(left + 0.3, row, f"{left:.0f} MiB", va="center", color=INK, size=11)
axes.set_yticks([1, 0], ["k, v stored", "recomputed"], size=11)
axes.set(
    xlim=(0, 30), xlabel="stored between forward and backward by 8 layers (MiB; lse is too thin)"
)
axes.spines[["top", "right", "left"]].set_visible(False)

# %% [markdown]
# Of the rest only $y$ grows with the length of the video, and it does not depend on the number of
# layers.
#
# ## The gradients do not change
#
# Recomputed from the same $y$ and the same weights, $k$ and $v$ are the same. The backward then
# differentiates the attention and, with $dk$ and $dv$, `make_kv`:
#
# $$dy = dk\,W_K^\top + dv\,W_V^\top \qquad dW_K = y^\top dk \qquad dW_V = y^\top dv$$
#
# **Predict.** In float64, how large is the difference between the gradients with stored and with
# recomputed keys and values?
#
# <details><summary>Reasoning</summary>
#
# The inputs have the same bits. Only the order of some sums differs, and float64 rounds at
# $10^{-16}$: about $10^{-15}$, relative to the largest gradient.
#
# </details>


# %%
def gradients(recompute_kv):
    """Return the gradients of x, of part of y, and of all weights."""
    layers = eight_layers(recompute_kv).double()
    x64, y64 = (t.detach().double().requires_grad_() for t in (x, y[:, :512]))
    return torch.autograd.grad(layers(x64, y64).square().sum(), [x64, y64, *layers.parameters()])


pairs = list(zip(gradients(True), gradients(False), strict=True))
assert len(pairs) == 2 + 4 * 8  # four weights per layer
assert all((a - b).abs().max() < 1e-12 * b.abs().max() for a, b in pairs)

# %% [markdown]
# ### Exercise 1: the backward with recomputation
#
# Write the part of the backward that computes $dy$. You are given $x$ and $y$, the weights $W$ of
# shape $(E, H, D)$, and `attention_backward(q, k, v)`, which returns $dq, dk, dv$.
# `project(features, weight)` projects features to heads. $dk$ and $dv$ are $(B, H_{KV}, S_{KV}, D)$
# and $y$ is $(B, S_{KV}, E)$, with $B$ videos; use `np.einsum` for the products.

# %%
rng = np.random.default_rng(0)
text, video = rng.standard_normal((1, 5, 6)), rng.standard_normal((1, 9, 6))  # E = 6
weights = [0.3 * rng.standard_normal((6, heads, 3)) for heads in (4, 2, 2)]  # of q, k, v; D = 3
print("k is", project(video, weights[1]).shape)
assert project(video, weights[1]).shape == (1, 2, 9, 3)


# %% tags=["exercise"]
def gradient_of_features(x, y, w_q, w_k, w_v, attention_backward):
    """Return dy."""
    raise NotImplementedError("gradient_of_features is not implemented")


# %% tags=["check"]
with check("dy is correct, through keys and through values"):
    from lvxattn.reference import full_attention_backward

    dout = np.random.default_rng(1).standard_normal((1, 4, 5, 3))
    w_q, w_k, w_v = weights

    def make_kv(y):
        return project(y, w_k), project(y, w_v)

    def passes(comm):
        """Run both passes of the project's own layer, and differentiate the projections."""
        out, saved = cross_attention_layer(project(text, w_q), video, make_kv, comm)
        _, dk, dv = cross_attention_layer_backward(dout, saved, make_kv, comm)
        dy_k, _ = project_backward(dk, video, w_k)
        dy_v, _ = project_backward(dv, video, w_v)
        return out, saved.lse, dy_k + dy_v

    ((out, lse, expected),) = run_ranks(1, passes)
    got = gradient_of_features(
        text, video, *weights, lambda q, k, v: full_attention_backward(dout, q, k, v, out, lse)
    )
    assert np.shape(got) == expected.shape, f"expected shape {expected.shape}, got {np.shape(got)}"
    error = abs(got - expected).max() / abs(expected).max()
    assert error < 1e-12, f"expected the layer's dy, got a relative error of {error:.0%}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def gradient_of_features(x, y, w_q, w_k, w_v, attention_backward):
#     q, k, v = project(x, w_q), project(y, w_k), project(y, w_v)
#     dq, dk, dv = attention_backward(q, k, v)
#     dy_k = np.einsum("bhsd,ehd->bse", dk, w_k)
#     dy_v = np.einsum("bhsd,ehd->bse", dv, w_v)
#     return dy_k + dy_v
# ```
#
# </details>

# %% [markdown]
# ## The cost of recomputation
#
# A product of an $(a \times b)$ and a $(b \times c)$ matrix takes $2abc$ operations. Attention has
# two such products in its forward and five in its backward (arXiv:2307.08691, section 4.1), each
# with $2 S_Q S_{KV} H D$ operations. A projection has one in its forward and two in its backward,
# for the gradients of the features and of the weight:
#
# | | forward | backward | recomputed |
# |---|---|---|---|
# | attention | $4\,S_Q S_{KV} H D$ | $10\,S_Q S_{KV} H D$ | |
# | $k$ and $v$ | $4\,S_{KV} E H_{KV} D$ | $8\,S_{KV} E H_{KV} D$ | $4\,S_{KV} E H_{KV} D$ |
# | $q$ | $2\,S_Q E H D$ | $4\,S_Q E H D$ | $2\,S_Q E H D$ |
# | $out\,W_O$ | $2\,S_Q E H D$ | $4\,S_Q E H D$ | |
#
# **Predict.** By how much does the arithmetic of the eight layers increase?
#
# <details><summary>Reasoning</summary>
#
# In units of $2 S_Q E H D = 2 \cdot 256 \cdot 256 \cdot 256$ operations: attention takes $7 \cdot
# 16 = 112$, $k$ and $v$ take 24, $q$ and the output 6, and recomputation adds 8 + 1. 9 of 142 is 6
# %.
#
# </details>

# %%
S_Q, S_KV, E, H, H_KV, D = 256, 4096, 256, 4, 1, 64
step = 14 * S_Q * S_KV * H * D + 12 * S_KV * E * H_KV * D + 12 * S_Q * E * H * D
more = 4 * S_KV * E * H_KV * D + 2 * S_Q * E * H * D
print(f"{more / step:.1%} more arithmetic")
assert round(more / step, 3) == 0.063

# %% [markdown]
# The time should follow the arithmetic. `benchmarks/recompute.py` times steps with stored and with
# recomputed keys and values, in turn. Its [results](../benchmarks/results/recompute.json) were
# recorded on two cores; all rows have the proportions above. Measure your machine with `python
# benchmarks/recompute.py --quick`.

# %%
rows = json.loads(Path("../benchmarks/results/recompute.json").read_text())["rows"]
ratios = [
    [a / b for a, b in zip(row["recomputed"]["step"], row["kept"]["step"], strict=True)]
    for row in rows
]
assert all(1 < median(found) < 1.08 for found in ratios)  # the paper: less than 8 %

# %% tags=["hide-input"]
names = [f"E = {r['E']}, y {'not ' * r['frozen']}trained" for r in rows]
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
for place, found in enumerate(ratios):
    axes.plot(100 * (np.array(found) - 1), [-place] * len(found), "o", color=COLOURS[4], ms=7)
    axes.plot(100 * (median(found) - 1), -place, "|", color=INK, ms=22, mew=2.5)
axes.axvline(100 * more / step, color=COLOURS[5], lw=1.5)
axes.text(100 * more / step, 0.62, "arithmetic ", color=COLOURS[5], size=10, ha="right")
axes.axvline(8, color=COLOURS[2], lw=1.5, ls="--")
axes.text(8, 0.62, " the paper's bound", color=COLOURS[2], size=10)
axes.set_yticks([0, -1, -2], names, size=10)
axes.set(ylim=(-2.6, 1.0), xlabel="increase of step time (%): pairs of steps, and the median")
axes.spines[["top", "right", "left"]].set_visible(False)

# %% [markdown]
# Single pairs scatter. The medians lie between 0 and the paper's bound of 8 %; the arithmetic
# predicts 6 %.
#
# ### Exercise 2: relative cost
#
# For a long video, the terms of the table without $S_{KV}$ can be neglected. Write the fraction of
# arithmetic that recomputation adds, for one of the project's models (`model.hidden` is $E$;
# `model.heads`, `model.kv_heads`) and $S_Q$ text tokens.


# %% tags=["exercise"]
def added(model, S_Q):
    """Return the operations of the recomputation, relative to those of a step."""
    raise NotImplementedError("added is not implemented")


# %% tags=["check"]
with check("recomputation is cheaper for longer texts, and for fewer key-value heads"):
    for name, tokens, right in (
        ("llama3v", 2048, 0.1), ("mplug-owl3-7b", 2048, 0.0588), ("llama3v", 5514, 0.0458),
    ):  # fmt: skip
        found = added(MODELS[name], tokens)
        said = f"{name}, {tokens:,} text tokens: expected {right:.2%}, got {found:.2%}"
        assert abs(found - right) < 1e-4, said

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# $S_{KV}$ and $D$ are in every remaining term, and cancel.
#
# ```python
# def added(model, S_Q):
#     projections = 4 * model.hidden * model.kv_heads
#     return projections / (14 * S_Q * model.heads + 3 * projections)
# ```
#
# For Llama 3-V with 2,048 text tokens that is 10 % of the arithmetic of cross-attention, with
# 5,514, the average of the paper's benchmark, 4.6 %. In a whole model, with self-attention and
# MLPs, the fraction is smaller.
#
# </details>

# %% [markdown]
# ## How many more frames fit
#
# Llama 3-V has 8 cross-attention layers with 8 key-value heads of 128 and $E = 4096$, and 6,404
# visual tokens per frame. In bfloat16 a number has 2 bytes.
#
# **Predict.** How much memory do the keys and values of all layers take for a video of 20 minutes,
# at one frame per second?
#
# <details><summary>Reasoning</summary>
#
# 1,200 · 6,404 = 7.7 million visual tokens; each has 2 · 8 · 128 numbers of 2 bytes in each of 8
# layers, 32 KiB per token: 235 GiB.
#
# </details>

# %%
llama = MODELS["llama3v"]
sizes = {"text_tokens": 2048, "frames": 1200, "P": 1, "dtype": "bfloat16"}
kept = memory(llama, **sizes, recompute=False)
again = memory(llama, **sizes, recompute=True)
print(f"y                     {kept.features / GB:4.0f} GB")
print(f"keys, values: stored  {kept.keys / GB:4.0f} GB,  recomputed {again.keys / GB:4.0f} GB")
assert int(kept.keys / 2**30) == 234
assert again.keys * llama.cross_layers == kept.keys

# %% [markdown]
# The paper's "over 234 GB" is this number, in units of $2^{30}$ bytes. With recomputation only the
# keys and values of one layer exist at a time, an eighth.
#
# Each of $P$ ranks has $1/P$ of it. The number of frames that fit depends on the bytes per frame on
# a rank.
#
# **Predict.** On 16 GPUs with 80 GB each, how many times as many frames fit if keys and values are
# recomputed?
#
# <details><summary>Reasoning</summary>
#
# A visual token has $E$ numbers of $y$ and $2 H_{KV} D = 2048$ numbers of keys and values, the
# latter in eight layers or in one. $(4096 + 8 \cdot 2048) / (4096 + 2048) = 3.3$.
#
# </details>

# %%
cluster = MACHINES["a100-16"]
room = {"text_tokens": 2048, "P": cluster.ranks, "room": cluster.room, "dtype": "bfloat16"}
fit = {again: most_frames(llama, **room, recompute=again) for again in (False, True)}
print(f"{fit[False]:,} frames with keys and values stored, {fit[True]:,} with recomputation")
assert round(fit[True] / fit[False], 1) == 3.3

# %% tags=["hide-input"]
frames = np.arange(0, 20_001, 500)
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
given = {"text_tokens": 2048, "P": cluster.ranks, "dtype": "bfloat16"}
for recompute, name, colour in ((False, "stored", COLOURS[5]), (True, "recomputed", COLOURS[0])):
    total = [memory(llama, frames=n, **given, recompute=recompute).total / GB for n in frames]
    axes.plot(frames, total, color=colour, lw=2.2)
    axes.plot(fit[recompute], cluster.room / GB, "o", color=colour, ms=8)
    axes.text(
        fit[recompute] + 250, 73, f"{fit[recompute]:,} frames\n{name}", color=colour, va="top"
    )
axes.axhline(cluster.room / GB, color=INK, lw=1.2, ls="--")
axes.xaxis.set_major_formatter("{x:,.0f}")
axes.text(20_000, 82, "80 GB", color=INK, ha="right")
axes.set(
    xlim=(0, 20_000), ylim=(0, 110), xlabel="frames of the video", ylabel="GB on each of 16 ranks"
)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# On twice as many ranks twice as many frames fit in both cases, so the ratio is the same.

# %%
twice = {again: most_frames(llama, **room | {"P": 32}, recompute=again) for again in (False, True)}
assert all(1.99 < twice[again] / fit[again] < 2.01 for again in (False, True))

# %% [markdown]
# ### Exercise 3: bytes of a visual token
#
# Write how many bytes a visual token takes on all ranks together, in bfloat16, during the backward
# of one of the layers. If `trained`, $y$ has a gradient $dy$, which is as large as $y$. There are
# `model.cross_layers` layers, and $D$ is `model.head_dim`.


# %% tags=["exercise"]
def token_bytes(model, *, recompute, trained):
    """Return the bytes of y, dy, keys and values that a visual token takes."""
    raise NotImplementedError("token_bytes is not implemented")


# %% tags=["check"]
with check("the bytes of a token, which determine how many frames fit"):
    for model in MODELS.values():
        for recompute in (False, True):
            one, two = (
                memory(model, 0, n, 1, dtype="bfloat16", recompute=recompute).total for n in (1, 2)
            )
            right = (two - one) // model.tokens_per_frame
            found = token_bytes(model, recompute=recompute, trained=False)
            case = f"{model.name}, {'recomputed' if recompute else 'stored'}"
            assert found == right, f"{case}: expected {right:,} bytes, got {found:,}"
            found = token_bytes(model, recompute=recompute, trained=True) - found
            right = 2 * model.hidden
            assert found == right, f"{case}: expected {right:,} bytes of dy, got {found:,}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def token_bytes(model, *, recompute, trained):
#     layers = 1 if recompute else model.cross_layers
#     keys_and_values = layers * 2 * model.kv_heads * model.head_dim
#     return 2 * ((2 if trained else 1) * model.hidden + keys_and_values)
# ```
#
# </details>

# %% [markdown]
# ## The paper's 1.6 times
#
# The paper reports 1.6 times as many frames. The next cell computes the ratio for each of its
# models.

# %%
ratio = {}
for name, model in MODELS.items():
    few, many = (most_frames(model, **room, recompute=again) for again in (False, True))
    ratio[name] = many / few
    print(f"{name:16} {ratio[name]:.2f}")
assert min(ratio.values()) > 1.6
assert round(ratio["mplug-owl3-7b"], 2) == round(ratio["mplug-owl3-1b"], 2) == 1.67
mplug = MODELS["mplug-owl3-7b"]
one_layer = 2 * mplug.kv_heads * mplug.head_dim  # numbers of a token's keys and values
with_dy = (2 * mplug.hidden + 4 * one_layer) / (2 * mplug.hidden + one_layer)
assert round(with_dy, 2) == 1.38

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
for place, (name, found) in enumerate(sorted(ratio.items(), key=lambda item: item[1])):
    axes.barh(place, found, color=COLOURS[0], height=0.62)
    layers = MODELS[name].cross_layers
    axes.text(found + 0.08, place, f"{found:.2f}, {layers} layers", va="center", color=INK)
axes.set_yticks(range(len(ratio)), sorted(ratio, key=lambda name: ratio[name]), size=10)
axes.axvline(1.6, color=COLOURS[5], lw=1.8)
axes.text(1.66, len(ratio) - 0.45, "the paper: 1.6", color=COLOURS[5])
axes.set(xlim=(0, 10.5), ylim=(-0.6, len(ratio)), xlabel="times as many frames with recomputation")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# The ratio is larger if more layers share $y$, and if keys and values are wider relative to $y$.
# For mPLUG-Owl3, which has four layers, it is close to the paper's figure. These ratios are upper
# bounds, under the following assumptions:
#
# - $y$ is stored once, and the keys and values of only one layer exist at a time.
# - Nothing else grows with the video. If the visual encoder is trained, $dy$ does (exercise 3), and
#   the ratio of mPLUG-Owl3-7b is 1.38 instead of 1.67.
# - Memory of constant size, such as weights, reduces both numbers of frames by the same factor.
#
# The number of frames is limited by the peak, which occurs in the backward, where $dk$, $dv$ and
# $dy$ exist as well. The recorded measurement includes the peak of the eight layers:

# %%
trained, frozen = rows[0], rows[1]
for row, what in ((trained, "y trained"), (frozen, "y not trained")):
    print(f"{what:14} between the passes {row['memory']:.0%}, at the peak {row['peak']:.0%}")
assert trained["peak"] > frozen["peak"] > trained["memory"]
assert trained["peak"] < 0.55

# %% [markdown]
# With recomputation the memory is 31 % between forward and backward, and half at the peak. A plan
# for real hardware has to account for both.
#
# ## Summary
#
# - Eight layers that read one $y$ store 31 % of the bytes if $q$, $k$ and $v$ are recomputed; the
#   gradients are the same up to rounding.
# - Recomputation costs one matrix product each for $k$, $v$ and $q$: a few percent of a step, less
#   for longer texts.
# - For Llama 3-V 3.3 times as many frames fit, for mPLUG-Owl3-7b 1.67 times (the paper: 1.6), as
#   long as nothing else grows with the video.
#
# Files: [reference/recompute.py](../reference/recompute.py),
# [torch_impl/recompute.py](../torch_impl/recompute.py),
# [src/lvxattn/plan/memory.py](../src/lvxattn/plan/memory.py),
# [benchmarks/activations.py](../benchmarks/activations.py).
#
# Next: [notebook 7, training on a long video](07_training_on_a_long_video.ipynb).
