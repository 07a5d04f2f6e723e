# %% [markdown]
# # 6. Forgetting keys and values: activation checkpointing
#
# A video of 20 minutes makes 234 GiB of keys and values in the eight cross-attention layers of
# Llama 3-V. That is more than three GPUs of 80 GB hold, and it is stored only because the backward
# reads it once more. Yet all eight layers compute it from the same visual features, which take a
# quarter of that.
#
# **You will be able to**
#
# - count, array by array, what cross-attention layers store between forward and backward;
# - write the backward of a layer that recomputes keys and values, and say where to put
#   `torch.utils.checkpoint` and where not;
# - predict how much arithmetic recomputation adds, and how many more frames fit.
#
# **Prerequisites.** [Notebook 5](05_going_backward.ipynb) for the gradients. Some PyTorch helps.
#
# **Time.** About 40 minutes.

# %%
import sys
from dataclasses import fields

import numpy as np
import torch
from exercise import check
from figures import recomputation
from torch.utils.checkpoint import checkpoint

sys.path.append("../benchmarks")
from activations import Layers, saved_bytes

# %%
from lvxattn.plan import MACHINES, MODELS, memory, messages, most_frames, planned
from lvxattn.reference import Saved
from lvxattn.reference.recompute import project

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
print(f"together {sum(kept.values()) / MiB:7.2f} MiB")
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

# %%
recomputation.stored({"k, v stored": kept, "recomputed": again})

# %% [markdown]
# Of the rest only $y$ grows with the length of the video, and it does not depend on the number of
# layers.
#
# <div class="alert alert-info">
#
# **Takeaway.** All layers read the same $y$. Stored keys and values grow with the number of layers;
# $y$ is stored once, and keys and values are one matrix product away from it.
#
# </div>
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
largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
assert largest < 1e-12
print(len(pairs), "gradients are the same to 12 digits, stored or recomputed")

# %% [markdown]
# ### Exercise 1: the backward with recomputation
#
# Write the part of the backward that computes $dy$. You are given $x$ and $y$, the weights $W$ of
# shape $(E, H, D)$, and `attention_backward(q, k, v)`, which returns $dq, dk, dv$; call it once.
# `project(features, weight)` projects features to heads. $dk$ and $dv$ are $(B, H_{KV}, S_{KV}, D)$
# and $y$ is $(B, S_{KV}, E)$, with $B$ videos; use `np.einsum` for the products.

# %%
rng = np.random.default_rng(0)
text, video = rng.standard_normal((1, 5, 6)), rng.standard_normal((1, 9, 6))  # E = 6
weights = [0.3 * rng.standard_normal((6, heads, 3)) for heads in (4, 2, 2)]  # of q, k, v; D = 3
assert project(video, weights[1]).shape == (1, 2, 9, 3)
print("k has shape", project(video, weights[1]).shape)


# %% tags=["exercise"]
def gradient_of_features(x, y, w_q, w_k, w_v, attention_backward):
    """Return dy."""
    raise NotImplementedError("gradient_of_features is not implemented")


# %% tags=["check", "hide-input"]
with check(
    "dy, through keys and through values, of every video",
    hide="text video weights x y kept again pairs",
):

    def trial(B, S_Q, S_KV, E, H, H_KV, D):
        """Compare dy with that of the library's layer."""
        from lvxattn import reference
        from lvxattn.reference.recompute import project_backward

        random = np.random.default_rng(1)
        x, y = random.standard_normal((B, S_Q, E)), random.standard_normal((B, S_KV, E))
        w_q, w_k, w_v = (0.3 * random.standard_normal((E, n, D)) for n in (H, H_KV, H_KV))
        dout, calls = random.standard_normal((B, H, S_Q, D)), []

        def make_kv(y):
            return project(y, w_k), project(y, w_v)

        def passes(comm):
            """Run both passes of the project's layer, and differentiate the projections."""
            out, saved = reference.cross_attention_layer(project(x, w_q), y, make_kv, comm)
            _, dk, dv = reference.cross_attention_layer_backward(dout, saved, make_kv, comm)
            return out, saved.lse, project_backward(dk, y, w_k)[0], project_backward(dv, y, w_v)[0]

        ((out, lse, through_k, through_v),) = reference.run_ranks(1, passes)

        def attention_backward(q, k, v):
            calls.append(1)
            for name, given, heads, rows in (("q", q, H, S_Q), ("k", k, H_KV, S_KV)):
                assert np.shape(given) == (B, heads, rows, D), (
                    f"attention_backward: {name}: expected shape {(B, heads, rows, D)}, "
                    f"got {np.shape(given)}"
                )
            return reference.full_attention_backward(dout, q, k, v, out, lse)

        got = gradient_of_features(x, y, w_q, w_k, w_v, attention_backward)
        case, want = f"B = {B}, H_KV = {H_KV}", through_k + through_v
        assert len(calls) == 1, f"attention_backward was called {len(calls)} times, expected once"
        assert np.shape(got) == want.shape, (
            f"{case}: expected shape {want.shape}, got {np.shape(got)}"
        )
        for part, name in ((through_k, "keys"), (through_v, "values")):
            assert not np.allclose(got, part), f"{case}: this is dy through the {name} alone"
        for number, (g, w) in enumerate(zip(got, want, strict=True)):
            assert abs(g - w).max() < 1e-12 * abs(want).max(), (
                f"{case}: dy of video {number}: expected {w[0].round(4)} for its first token, "
                f"got {g[0].round(4)}"
            )

    trial(B=1, S_Q=5, S_KV=9, E=6, H=4, H_KV=2, D=3)
    trial(B=2, S_Q=4, S_KV=7, E=5, H=6, H_KV=2, D=3)
    trial(B=1, S_Q=4, S_KV=7, E=5, H=6, H_KV=3, D=2)
    trial(B=3, S_Q=2, S_KV=4, E=8, H=2, H_KV=1, D=4)

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
# 16 = 112$, $k$ and $v$ take 24, $q$ and the output 6, and recomputation adds 8 + 1. 9 of 142 is
# 6 %.
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
import json
from pathlib import Path
from statistics import median

rows = json.loads(Path("../benchmarks/results/recompute.json").read_text())["rows"]
ratios = [
    [a / b for a, b in zip(row["recomputed"]["step"], row["kept"]["step"], strict=True)]
    for row in rows
]
medians = [median(found) - 1 for found in ratios]
assert all(0 < found < 0.08 for found in medians)  # the paper: less than 8 %
print("medians:", ", ".join(f"{found:.1%}" for found in medians), "more time")

# %%
names = [f"E = {r['E']}, y {'not ' * r['frozen']}trained" for r in rows]
recomputation.increase_of_time(names, ratios, arithmetic=more / step)

# %% [markdown]
# The medians lie between 0 and the paper's bound of 8 %; the arithmetic predicts 6 %. Single pairs
# scatter, and one is far off: with recomputation, which computes more, that step took 18 % *less*
# time.
#
# **Predict.** Was the step with recomputation fast, or the other one slow?
#
# <details><summary>Reasoning</summary>
#
# More arithmetic is not faster; something else used the cores during the other step. If so, steps
# just before it, of both kinds, may have been slow as well. Below are the steps of that row in the
# order in which they were run: the two kinds take turns at being first.
#
# </details>

# %%
outlier = min(range(9), key=lambda n: ratios[0][n])
steps = []
for pair in range(9):
    turn = ("kept", "recomputed") if pair % 2 else ("recomputed", "kept")
    steps += [(kind, rows[0][kind]["step"][pair]) for kind in turn]
recomputation.steps_in_order(steps, outlier)

# %%
usual = median(seconds for kind, seconds in steps if kind == "kept")
slow = [n for n, (_, seconds) in enumerate(steps) if seconds > 1.25 * usual]
assert slow == [0, 1, 2]
rest = median(ratios[0][outlier + 1 :]) - 1
assert abs(rest - medians[0]) < 0.01
print(f"steps {slow} were slow; without their pairs the median is {rest:.1%} more time")
mean = np.mean(ratios[0]) - 1
assert medians[0] - mean > 0.02
print(f"of all pairs the median is {medians[0]:.1%}, and the mean {mean:.1%}")

# %% [markdown]
# The first three steps were slow, two without recomputation and one with it. Then the machine was
# free again, in the middle of the second pair: its first step is from the slow time, its second is
# almost as fast as all later ones. The outlier says nothing about recomputation. It pulls the
# mean down by more than two percentage points, and leaves the median where it is. That is why the
# benchmark measures in pairs, lets the two kinds take turns at being first, and reports medians.
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


# %% tags=["check", "hide-input"]
with check(
    "recomputation is cheaper for longer texts, and for fewer key-value heads",
    hide="S_Q S_KV E H H_KV D step more MODELS",
):

    def trial(model, S_Q):
        """Compare with the table, for so many visual tokens that other terms do not count."""
        S_KV, E, H, H_KV, D = 10**12, model.hidden, model.heads, model.kv_heads, model.head_dim
        step = 14 * S_Q * S_KV * H * D + 12 * S_KV * E * H_KV * D + 12 * S_Q * E * H * D
        want = (4 * S_KV * E * H_KV * D + 2 * S_Q * E * H * D) / step
        found = added(model, S_Q)
        assert isinstance(found, int | float | np.number), f"expected a number, got {found}"
        hint = ""
        if abs(found - want / (1 + want)) < 1e-6:
            hint = ", which is relative to a step that includes the recomputation"
        assert abs(found - want) < 1e-6, (
            f"{model.name}, {S_Q:,} text tokens: expected {want:.3%}, got {found:.3%}{hint}"
        )

    def trials():
        """Try the project's models, and one that does not exist."""
        from lvxattn import plan

        for name, S_Q in (("llama3v", 2048), ("mplug-owl3-7b", 2048), ("llama3v", 5514)):
            trial(plan.MODELS[name], S_Q)
        for number, model in enumerate(plan.MODELS.values()):
            trial(model, 700 + 300 * number)
        trial(plan.Model("an invented model", 640, 6, 3, 96, 5, 20, 100), 333)

    trials()

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
# ## Where to put `torch.utils.checkpoint`
#
# PyTorch's tool for this is `checkpoint(function, *arguments)`: it runs the function, stores its
# arguments only, and runs it again in the backward. Training scripts usually put it around whole
# layers; in transformers, `model.gradient_checkpointing_enable()` does.
#
# **Predict.** What do the eight layers store if each is put in a checkpoint? What is computed
# twice?
#
# <details><summary>Reasoning</summary>
#
# The arguments: $x$ of every layer and $y$, 2 + 4 = 6 MiB. But attention is inside, so that its
# forward runs again, with $4\,S_Q S_{KV} H D$ operations: 32 units of 142, in addition to the 9 of
# $q$, $k$ and $v$. Together that is 29 % more arithmetic.
#
# </details>


# %%
class Checkpointed(Layers):
    """Layers that are each in a checkpoint."""

    def forward(self, x, y):
        """Return x plus the outputs of all layers."""
        for layer in self.layers:
            x = x + checkpoint(layer, x, y, use_reentrant=False)
        return x


torch.manual_seed(0)
whole = Checkpointed(8, 256, 4, num_kv_heads=1, recompute_kv=False)

# %% [markdown]
# PyTorch can count the operations that really run. It has to be told those of the attention kernel
# for CPUs: four for each element of $q$ and each key, and ten in the backward.

# %%
from math import prod

from torch.utils.flop_counter import FlopCounterMode

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CUSTOM = {
    FLASH: lambda q, k, *_, **__: 4 * prod(q) * k[2],  # q and k are shapes
    FLASH_BACKWARD: lambda dout, q, k, *_, **__: 10 * prod(q) * k[2],
}


# %%
def operations(layers):
    """Return the operations of a forward and a backward."""
    with FlopCounterMode(display=False, custom_mapping=CUSTOM) as counter:
        layers(x, y).sum().backward()
    return counter.get_total_flops()


# %%
variants = {"nothing": eight_layers(False), "q, k, v": eight_layers(True), "the layer": whole}
stored = {what: sum(saved_bytes(layers, x, y).values()) for what, layers in variants.items()}
done = {what: operations(layers) for what, layers in variants.items()}
assert done["nothing"] == 8 * step and done["q, k, v"] == 8 * (step + more)
extra = {what: found / done["nothing"] - 1 for what, found in done.items()}
for what in variants:
    size = f"{stored[what] / MiB:4.1f} MiB stored"
    print(f"recomputed: {what:9}  {size}, {extra[what]:5.1%} more arithmetic")
assert round(extra["the layer"], 2) == 0.29

# %% [markdown]
# The counter confirms the table of operations exactly. A checkpoint around the layer stores 2 MiB
# less, those of `out`, which belong to the text. On many ranks it has another cost.
#
# **Predict.** One layer of Llama 3-V on 8 ranks sends 776 bytes for a row of queries in its forward
# (256 of $q$, and 4 · 130 of the result, whose lse travels as a maximum and a sum) and 1,032 in its
# backward ([notebook 5](05_going_backward.ipynb)). How many bytes more are sent with a checkpoint
# around the layer?
#
# <details><summary>Reasoning</summary>
#
# The forward runs twice, with all its messages: 776 bytes more for 1,808, or 43 %. To recompute
# $k$ and $v$ a rank needs only its own part of $y$, and no message.
#
# </details>

# %%
layout = planned(*MODELS["llama3v"].shapes(text_tokens=2048, frames=64), 8)
rows_sent = 7 * layout.H * 2048 // 8  # of queries, over 7 hops
forward, backward = (
    sum(m.nbytes for m in messages(layout, rank=0, backward=b)) / rows_sent for b in (False, True)
)
assert (forward, backward, forward + backward) == (776, 1032, 1808)
again_sent = forward / (forward + backward)
assert round(again_sent, 2) == 0.43
print(f"{forward:.0f} and {backward:,.0f} bytes for a row; "
      f"a checkpoint around the layer: {again_sent:.0%} more bytes sent")  # fmt: skip

# %%
sent_more = {"nothing": 0, "q, k, v": 0, "the layer": again_sent}
recomputation.where_to_checkpoint(
    {what: (stored[what], extra[what], sent_more[what]) for what in variants}
)

# %% [markdown]
# From top to bottom: nothing is recomputed, the projections, or the whole layer. The projections,
# which are cheap and make the large arrays, should be inside the checkpoint, and attention, which
# is expensive, outside.
#
# **Predict.** The obvious way to write that is `q, k, v = checkpoint(projections, x, y)`, and then
# `attention(q, k, v)`. How many of the 2 MiB of keys and values of a layer are still stored?
#
# <details><summary>Reasoning</summary>
#
# All. The checkpoint stores nothing of its own, but attention is an operation like any other: for
# its backward it saves its arguments, which are $q$, $k$ and $v$.
#
# </details>

# %%
layer = eight_layers(False).layers[0]
heads = ((layer.q_proj, x), (layer.k_proj, y), (layer.v_proj, y))


def projections(*_):
    """Return q, k and v."""
    return [linear(given).unflatten(-1, (-1, 64)).transpose(1, 2) for linear, given in heads]


def obvious():
    """Attend to keys and values that were made in a checkpoint."""
    q, k, v = checkpoint(projections, x, y, use_reentrant=False)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# %%
saved = []
with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
    obvious()
of_keys = [t.numel() * t.element_size() for t in saved if t.shape == (1, 1, 4096, 64)]
assert sum(of_keys) == 2 * MiB
print(f"{len(of_keys)} arrays of the shape of k are stored, {sum(of_keys) / MiB:.0f} MiB")

# %% [markdown]
# So nothing is gained. In the layers of this project, attention does not save $q$, $k$ and $v$. A
# function `Made`, the last one inside the checkpoint, returns its arguments and saves them. Inside
# a checkpoint that means: recompute them when they are read. The backward of attention reads them
# from `Made`, and so starts the recomputation. These are fewer than twenty lines of
# [torch_impl/recompute.py](../torch_impl/recompute.py).
#
# Everything else is that of `torch.utils.checkpoint`: random numbers and autocast are restored, the
# projections may be any modules, and they must compute the same the second time. Layers that
# recompute keys and values can themselves be part of a checkpointed block. Then the block's forward
# runs again, with attention and its messages: the block pays for both. Leave cross-attention out of
# such blocks where memory permits.
#
# For self-attention, Megatron's selective recomputation makes the opposite choice: it stores $q$,
# $k$ and $v$ and recomputes the attention (arXiv:2205.05198). It was made for kernels that store
# the matrix of scores; those of today do not.
#
# <div class="alert alert-info">
#
# **Takeaway.** Recompute what is cheap to compute and large to store: here the projections.
# Attention is expensive to recompute, in arithmetic and in messages, and its result is as short as
# the text.
#
# </div>
#
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
assert int(kept.keys / 2**30) == 234
assert again.keys * llama.cross_layers == kept.keys
print(f"y                     {kept.features / GB:4.0f} GB")
print(f"keys, values: stored  {kept.keys / GB:4.0f} GB,  recomputed {again.keys / GB:4.0f} GB")

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

# %%
frames = np.arange(0, 20_001, 500)
given = {"text_tokens": 2048, "P": cluster.ranks, "dtype": "bfloat16"}
kinds = {"stored": False, "recomputed": True}
totals = {
    name: [memory(llama, frames=n, **given, recompute=again).total for n in frames]
    for name, again in kinds.items()
}
fitting = {name: fit[again] for name, again in kinds.items()}
recomputation.frames_that_fit(frames, totals, fitting, cluster.room)

# %% [markdown]
# On twice as many ranks twice as many frames fit in both cases, so the ratio is the same.

# %%
twice = {again: most_frames(llama, **room | {"P": 32}, recompute=again) for again in (False, True)}
assert all(1.99 < twice[again] / fit[again] < 2.01 for again in (False, True))
print(f"on 32 ranks {twice[False]:,} and {twice[True]:,} frames: twice as many of both")

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


# %% tags=["check", "hide-input"]
from lvxattn import plan


def trial(model, plan=plan):
    """Compare with the memory that another frame takes."""
    for recompute in (False, True):
        one, two = (
            plan.memory(model, 0, n, 1, dtype="bfloat16", recompute=recompute) for n in (1, 2)
        )
        y, kv = (
            (getattr(two, part) - getattr(one, part)) // model.tokens_per_frame
            for part in ("features", "keys")
        )
        case = f"{model.name}, {'recomputed' if recompute else 'stored'}"
        for trained, parts in ((False, "y"), (True, "y and dy")):
            found = token_bytes(model, recompute=recompute, trained=trained)
            assert isinstance(found, int | float | np.number), f"expected a number, got {found}"
            both = 2 * y if trained else y
            assert found == both + kv, (
                f"{case}, {'' if trained else 'not '}trained: expected {both:,} bytes of "
                f"{parts} and {kv:,} of keys and values, {both + kv:,} together, got {found:,}"
            )


models = [*plan.MODELS.values(), plan.Model("an invented model", 640, 6, 3, 96, 5, 20, 100)]
with check(
    "the bytes of a token, which determine how many frames fit",
    hide="MODELS llama kept again fit twice",
    hide_packages="lvxattn",
):
    for model in models:
        trial(model)

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

# %%
recomputation.ratios_of_models(ratio, {name: MODELS[name].cross_layers for name in ratio})

# %% [markdown]
# The largest ratio is far from the others.
#
# **Predict.** Call the numbers of keys and values of a token in one layer $n = 2 H_{KV} D$. Write
# the ratio as a function of $n / E$ and the number of layers $L$. What makes openflamingo-3b
# different from openflamingo-9b, which has the same $n$?
#
# <details><summary>Reasoning</summary>
#
# The ratio is $(E + L n) / (E + n) = (1 + L\,n/E) / (1 + n/E)$. The smaller model has the larger
# ratio for two reasons: it has cross-attention in every one of its 24 blocks, not in every fourth,
# and its $E$ is half as large, so that $n / E$ is $1/2$, not $1/4$. In mPLUG-Owl3, $n / E$ is 0.29
# to 0.33, between these two, but there are four layers.
#
# </details>

# %%
print("                 layers   n / E   ratio   MB of a frame, stored")
for name, model in MODELS.items():
    n = 2 * model.kv_heads * model.head_dim / model.hidden
    formula = (1 + model.cross_layers * n) / (1 + n)
    assert abs(formula / ratio[name] - 1) < 0.01
    frame = 2 * model.tokens_per_frame * model.hidden * (1 + model.cross_layers * n) / 1e6
    print(f"{name:16} {model.cross_layers:5} {n:9.2f} {formula:7.2f} {frame:9.1f}")

# %% [markdown]
# So the outlier follows the formula like all others. It is also a model that hardly needs
# recomputation: a frame becomes 64 tokens, not 6,404, and takes 3.4 MB with everything stored,
# where a frame of Llama 3-V takes 262. (The plan counts $y$ as wide as the text. In OpenFlamingo it
# is as wide as the vision encoder, 1,024 numbers, which would make the ratio 12.5.)
#
# For mPLUG-Owl3, with four layers, the ratio is close to the paper's figure. All of these are upper
# bounds, under the following assumptions:
#
# - $y$ is stored once, and the keys and values of only one layer exist at a time.
# - Nothing else grows with the video. If the visual encoder is trained, $dy$ does (exercise 3), and
#   the ratio of mPLUG-Owl3-7b is 1.38 instead of 1.67.
# - Memory of constant size, such as weights, reduces both numbers of frames by the same factor.

# %%
mplug = MODELS["mplug-owl3-7b"]
one_layer = 2 * mplug.kv_heads * mplug.head_dim  # numbers of a token's keys and values
with_dy = (2 * mplug.hidden + 4 * one_layer) / (2 * mplug.hidden + one_layer)
assert round(with_dy, 2) == 1.38
print(f"mplug-owl3-7b with dy: {with_dy:.2f}")

# %% [markdown]
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
# <div class="alert alert-info">
#
# **Takeaways.** Of activation checkpointing in cross-attention:
#
# - Eight layers that read one $y$ store 31 % of the bytes if $q$, $k$ and $v$ are recomputed; the
#   gradients are the same up to rounding.
# - Recomputation costs one matrix product each for $k$, $v$ and $q$, and no message: a few percent
#   of a step, less for longer texts. A checkpoint around the layer costs 29 % and sends the
#   forward's messages twice.
# - For Llama 3-V 3.3 times as many frames fit, for mPLUG-Owl3-7b 1.67 times (the paper: 1.6), as
#   long as nothing else grows with the video.
#
# </div>
#
# Files: [reference/recompute.py](../reference/recompute.py),
# [torch_impl/recompute.py](../torch_impl/recompute.py),
# [src/lvxattn/plan/memory.py](../src/lvxattn/plan/memory.py),
# [benchmarks/activations.py](../benchmarks/activations.py).
#
# Next: [notebook 7, training on a long video](07_training_on_a_long_video.ipynb).
