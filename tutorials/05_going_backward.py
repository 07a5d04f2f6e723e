# %% [markdown]
# # 5. Going backward: the gradients
#
# You will learn to derive every gradient of attention, which four arrays travel in the backward
# pass over many ranks and why `out` is not one of them, and how many bytes they have.
#
# Prerequisites: [notebook 1](01_merging_softmax.ipynb) for `(out, lse)`, [notebook
# 3](03_the_ring_in_one_process.ipynb) for the ring of virtual ranks. Time: about 45 minutes.

# %%
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
from exercise import check
from matplotlib.patches import Ellipse, Rectangle

from lvxattn.common.wire import BLOCKS, RESULTS
from lvxattn.draw.rotation import COLOURS, INK, follow
from lvxattn.plan import MODELS, messages, planned
from lvxattn.reference import (
    block_attention,
    block_attention_backward,
    cross_attention_backward,
    full_attention,
    full_attention_backward,
    run_ranks,
    shard,
)  # fmt: skip

BLUE, ORANGE, GREEN, RED = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[5]
plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11,
    "axes.spines.top": False, "axes.spines.right": False,
})  # fmt: skip

# %% [markdown]
# ## Notation
#
# The loss $\mathcal{L}$ is a scalar. We write $dx$ for $\partial \mathcal{L} / \partial x$; it has
# the shape of $x$. The backward of attention is given $\mathrm{dout}$ by the layers above it, and
# returns $dq$, $dk$ and $dv$. The forward is
#
# $$s_j = \mathrm{scale}\; q \cdot k_j \qquad \mathrm{lse} = \log \sum_j e^{s_j} \qquad
#   p_j = e^{s_j - \mathrm{lse}} \qquad \mathrm{out} = \sum_j p_j v_j$$
#
# $p_j$ is the weight of key $j$. All sizes below differ, so that wrong shapes raise errors.

# %%
rng = np.random.default_rng(0)
scale = 0.5
q, dout = rng.standard_normal((1, 2, 8, 4)), rng.standard_normal((1, 2, 8, 3))
k, v = rng.standard_normal((1, 2, 24, 4)), rng.standard_normal((1, 2, 24, 3))
out, lse = full_attention(q, k, v, scale=scale)
s = scale * q @ k.swapaxes(2, 3)
p = np.exp(s - lse[..., None])
assert p.shape == (1, 2, 8, 24)  # (B, H, S_Q, S_KV)
assert np.allclose(p @ v, out, atol=1e-13, rtol=0)

# %% [markdown]
# ## The Jacobian of softmax
#
# The derivative of $\mathrm{lse}$ with respect to $s_j$ is $p_j$. So
#
# $$\frac{\partial p_i}{\partial s_j} = p_i \left([i = j] - p_j\right)$$
#
# $[i = j]$ is 1 if $i = j$, else 0. Increasing a score increases its own weight and decreases all
# others.
#
# **Predict.** What does a row of this matrix sum to?
#
# <details><summary>Reasoning</summary>
#
# It sums to 0. The sum over $j$ is the derivative for a constant added to all scores, which changes
# no weight (notebook 1).
#
# </details>
#
# If the values are unit vectors, `full_attention` returns its weights. Below are eight scores and
# their Jacobian.


# %%
def weights_of(s):
    """Return the weights of keys with these scores."""
    one, keys, units = np.ones((1, 1, 1, 1)), s[None, None, :, None], np.eye(len(s))[None, None]
    return full_attention(one, keys, units, scale=1.0)[0][0, 0, 0]


eight = np.array([2.0, 1.5, 1.2, 1.0, 0.5, 0.0, -0.5, -1.0])
p_8 = weights_of(eight)
jacobian = np.diag(p_8) - np.outer(p_8, p_8)
assert abs(jacobian.sum(axis=1)).max() < 1e-15

# %% [markdown]
# Central differences check the derivative: change each score by a small step to both sides, and
# measure the change of the weights.

# %%
step = 1e-5
moves = [(weights_of(eight + e) - weights_of(eight - e)) / (2 * step) for e in step * np.eye(8)]
error = abs(np.stack(moves, axis=1) - jacobian).max()
print("the differences and the Jacobian agree to nine digits:", error < 1e-9)
assert error < 1e-9

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), width_ratios=(2, 5), sharey=True)
left.barh(range(8), p_8, color=BLUE, height=0.8)
left.set(xlabel="weight i", ylabel="key i", yticks=range(8), xlim=(0, 0.36))
right.imshow(jacobian, cmap="PuOr_r", vmin=-0.25, vmax=0.25, aspect="auto")
for (i, j), value in np.ndenumerate(jacobian):
    colour = "white" if value > 0.15 else INK
    right.text(j, i, f"{value:+.3f}", ha="center", va="center", size=9.5, color=colour)
right.set(xlabel="score j", xticks=range(8))
right.set_title("derivative of weight i with respect to score j", size=12)
right.tick_params(length=0)
right.spines[["left", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# ## From out to the scores
#
# $\mathrm{out} = \sum_j p_j v_j$ gives two gradients, and the Jacobian above the third:
#
# $$dv_j = p_j\,\mathrm{dout} \qquad dp_j = \mathrm{dout} \cdot v_j$$
#
# $$ds_j = \sum_i dp_i\, p_i\left([i = j] - p_j\right)
#        = p_j \Big(dp_j - \underbrace{\sum_i p_i\, dp_i}_{\delta}\Big)$$
#
# The sum $\delta$ runs over all keys. If keys are sharded, that would be a reduction over ranks in
# every backward.
#
# **Predict.** Can it be computed without the keys and values?
#
# <details><summary>Reasoning</summary>
#
# $\sum_i p_i\, \mathrm{dout} \cdot v_i = \mathrm{dout} \cdot \sum_i p_i v_i
# = \mathrm{dout} \cdot \mathrm{out}$. The forward has already computed this sum.
#
# </details>

# %%
dp = dout @ v.swapaxes(2, 3)
over_all_keys = (p * dp).sum(axis=-1)
delta = (dout * out).sum(axis=-1)
print("delta", delta.shape, "from", dp.shape, "products, or from out alone")
assert np.allclose(delta, over_all_keys, atol=1e-13, rtol=0)

# %% [markdown]
# `delta = rowsum(dout * out)` is one number per query, computed on the rank that owns the query
# (arXiv:2307.08691, algorithm 2). Below are all gradients, with the shapes for one head.
#
# **Predict.** Which of these products sum over keys, and which over queries?
#
# | gradient | shapes |
# |---|---|
# | $dv = p^\top\, \mathrm{dout}$ | (S_KV, S_Q) (S_Q, D_V) → (S_KV, D_V) |
# | $dp = \mathrm{dout}\, v^\top$ | (S_Q, D_V) (D_V, S_KV) → (S_Q, S_KV) |
# | $ds = p\, (dp - \delta)$ | (S_Q, S_KV), element by element; $\delta$ is the same for all keys |
# | $dq = \mathrm{scale}\; ds\, k$ | (S_Q, S_KV) (S_KV, D) → (S_Q, D) |
# | $dk = \mathrm{scale}\; ds^\top q$ | (S_KV, S_Q) (S_Q, D) → (S_KV, D) |
#
# <details><summary>Reasoning</summary>
#
# The contracted axis is summed over: keys in $dq$, queries in $dk$ and $dv$. If keys are sharded,
# $dq$ is a sum over ranks; if queries are sharded, $dk$ and $dv$ are.
#
# </details>
#
# ### Exercise 1: the gradients
#
# Write them in terms of `lse` and `delta`, without `out` and without a softmax. Here every
# key-value head has one query head.


# %% tags=["exercise"]
def gradients(dout, q, k, v, lse, delta, scale):
    """Return dq, dk and dv."""
    raise NotImplementedError("gradients is not implemented")


# %% tags=["check"]
with check("dq, dk and dv are those of full_attention_backward"):
    got = gradients(dout, q, k, v, lse, delta, scale)
    want = full_attention_backward(dout, q, k, v, out, lse, scale=scale)
    for name, g, w in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert g.shape == w.shape, f"{name}: expected shape {w.shape}, got {g.shape}"
        assert np.allclose(g, w, atol=1e-12, rtol=0), (
            f"{name}: expected {w[0, 0, 0]} for the first row, got {g[0, 0, 0]}"
        )

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def gradients(dout, q, k, v, lse, delta, scale):
#     """Return dq, dk and dv."""
#     p = np.exp(scale * q @ k.swapaxes(2, 3) - lse[..., None])
#     ds = p * (dout @ v.swapaxes(2, 3) - delta[..., None])
#     dv = p.swapaxes(2, 3) @ dout
#     return scale * ds @ k, scale * ds.swapaxes(2, 3) @ q, dv
# ```
#
# </details>

# %% [markdown]
# ## Check with finite differences
#
# Gradients can be measured without a formula. Move an argument along a direction $t$, by a step $h$
# to both sides: the loss changes at the rate $dx \cdot t$, up to the error of the difference.
#
# The error has two parts: truncation, proportional to $h^2$, from the third derivative of the loss,
# and rounding, proportional to $1/h$.
#
# **Predict.** For one of $q$, $k$ and $v$ there is only one of the two errors, at any step. Which
# of the three is it, and which error?
#
# <details><summary>Reasoning</summary>
#
# `out` is linear in $v$: there is no truncation error, only rounding, and a larger step is better.
#
# </details>


# %%
def loss(**moved):
    """Return sum(dout * out): its gradient with respect to out is dout."""
    x = {"q": q, "k": k, "v": v, **moved}
    return (dout * full_attention(x["q"], x["k"], x["v"], scale=scale)[0]).sum()


def error_of_difference(name, x, dx, h):
    """Return the relative error of the central difference, along a random direction."""
    t = np.random.default_rng(1).standard_normal(x.shape)
    rate = (loss(**{name: x + h * t}) - loss(**{name: x - h * t})) / (2 * h)
    return abs(rate - (dx * t).sum()) / abs(dx * t).sum()


# %%
steps = 10.0 ** np.arange(-10, -0.9, 0.5)
dq, dk, dv = full_attention_backward(dout, q, k, v, out, lse, scale=scale)
given = {"q": (q, dq), "k": (k, dk), "v": (v, dv)}
errors = {
    name: np.array([error_of_difference(name, *pair, h) for h in steps])
    for name, pair in given.items()
}

# %%
assert max(e.min() for e in errors.values()) < 1e-10
for name in ("q", "k"):  # from 1e-2 to 1e-3 the truncation error falls by 100
    assert 80 < errors[name][-3] / errors[name][-5] < 125
assert errors["v"][-1] < 1e-13

# %% tags=["hide-input", "varies"]
figure, axes = plt.subplots(figsize=(8, 3.9))
for (name, error), colour in zip(errors.items(), (BLUE, GREEN, ORANGE), strict=True):
    axes.loglog(steps, error, "o-", color=colour, lw=2, ms=4)
    beside = {"q": 4, "k": 0.2, "v": 1}[name] * error[-1]  # the first two are almost the same
    axes.text(0.12, beside, f"$d{name}$", color=colour, size=14, va="center")
axes.loglog(steps[-7:], 3e-3 * steps[-7:] ** 2, color=INK, lw=1, ls=(0, (4, 3)))
axes.loglog(steps[:10], 3e-18 / steps[:10], color=INK, lw=1, ls=(0, (4, 3)))
axes.text(1e-3, 3e-10, r"$h^2$", color=INK, size=13)
axes.text(1.5e-9, 2e-10, "$1/h$", color=INK, size=13)
axes.set(xlabel="step h", ylabel="error of the difference", xlim=(6e-11, 0.2))
plt.show()

# %% [markdown]
# The gradients are correct: at the best step, the differences confirm ten digits.
#
# ## Split the keys
#
# In notebook 1 the results of parts were merged with weights.
#
# **Predict.** Is a merge needed for the gradients?
#
# <details><summary>Reasoning</summary>
#
# No. With the lse over all keys, $p_j = e^{s_j - \mathrm{lse}}$ is the weight of key $j$ among all
# keys, regardless of which part computes it. The rest are sums.
#
# </details>
#
# `block_attention_backward` differentiates one block, given `lse` and `delta` over all keys: it
# returns the part's contribution to `dq`, and adds to `dk` and `dv` in place.

# %%
rows = [np.s_[:, :, start : start + 6] for start in range(0, 24, 6)]  # keys of four ranks
dk_sum, dv_sum = np.zeros_like(k), np.zeros_like(v)
shares = [
    block_attention_backward(dout, q, k[r], v[r], lse, delta, dk_sum[r], dv_sum[r], scale=scale)
    for r in rows
]
for got, want in ((sum(shares), dq), (dk_sum, dk), (dv_sum, dv)):
    assert np.allclose(got, want, atol=1e-13, rtol=0)

# %% [markdown]
# The gradient is a plain sum of four contributions. Now pass the wrong lse: that over each part's
# own keys, as its forward computes it.
#
# **Predict.** How are the weights wrong?
#
# <details><summary>Reasoning</summary>
#
# They sum to 1 in every part, so to 4 in total. Each part normalises as if there were no other
# keys.
#
# </details>

# %%
own = [block_attention(q, k[r], v[r], scale=scale)[1] for r in rows]
part_of = np.stack([p[..., r[2]].sum(axis=-1) for r in rows])
assert np.allclose(part_of, np.exp(np.stack(own) - lse), rtol=1e-12)  # weights of the merge
assert np.allclose(part_of.sum(axis=0), 1, rtol=1e-12)

# %%
wrong = np.zeros_like(v)
for r, lse_r in zip(rows, own, strict=True):
    block_attention_backward(dout, q, k[r], v[r], lse_r, delta, dk_sum[r], wrong[r], scale=scale)
ratio = np.linalg.norm(wrong) / np.linalg.norm(dv)
print(f"dv is {ratio:.0f} times as large as it should be")
assert ratio > 2

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(24, 11), sharey=True)
left.pcolormesh(p[0, 0], cmap="Greys", edgecolor="white", lw=0.5)
start = np.zeros(8)
for rank, colour in enumerate(COLOURS[:4]):
    left.add_patch(Rectangle((6 * rank, -0.45), 6, 0.4, color=colour, lw=0, clip_on=False))
    left.text(6 * rank + 3, -0.62, f"keys of rank {rank}", color=colour, ha="center", size=11)
    left.axvline(6 * rank, color=INK, lw=1.5)
    right.barh(np.arange(8) + 0.5, part_of[rank, 0, 0], left=start, color=colour, height=0.85)
    start += part_of[rank, 0, 0]
left.set(xlabel="key", ylabel="query", ylim=(8, 0), yticks=np.arange(8) + 0.5,
         yticklabels=range(8), xticks=range(0, 25, 6))  # fmt: skip
right.set(xlabel="weight of each rank's keys", xlim=(0, 1))
right.set_title("sum: 1", size=11)
plt.show()

# %% [markdown]
# Left: $p$ of the first head, darker is larger. Given `lse`, a rank's columns do not depend on data
# of other ranks. Right: the sums over each rank's columns, which are the weights of the merge,
# $e^{\mathrm{lse}_r - \mathrm{lse}}$ for rank $r$.
#
# ## Split the queries
#
# `dk` and `dv` are sums over queries. A rank need not have all queries at once: blocks of queries
# may arrive one after the other, and each adds to the same `dk` and `dv`.

# %%
dk_sum, dv_sum = np.zeros_like(k), np.zeros_like(v)
for start in range(0, 8, 2):
    b = np.s_[:, :, start : start + 2]
    block_attention_backward(dout[b], q[b], k, v, lse[b], delta[b], dk_sum, dv_sum, scale=scale)
assert np.allclose(dk_sum, dk, atol=1e-13, rtol=0)
assert np.allclose(dv_sum, dv, atol=1e-13, rtol=0)

# %% [markdown]
# ## The backward pass on the ring
#
# Together these two splits are the backward of LV-XAttn (arXiv:2502.02406, section 3). Keys,
# values, `dk` and `dv` stay. A block travels round the ring again, with the inputs of its
# gradients: `q`, `dout`, `lse` and `delta`. Its `dq` follows one hop behind and ends on the block's
# owner. The owner computes `delta` once, from `out`, so `out` need not travel.
#
# **Predict.** How many messages does the backward send on four ranks?
#
# <details><summary>Reasoning</summary>
#
# Every rank's block makes $P - 1 = 3$ hops, and so does every `dq`: $2 P (P - 1) = 24$.
#
# </details>

# %%
P = 4


def backward(comm):
    """Return the gradients of a rank's shards."""
    mine = [shard(x, comm) for x in (dout, q, k, v, out, lse)]
    return cross_attention_backward(*mine, comm, scale=scale)


# %%
log = []
of_ranks = zip(*run_ranks(P, backward, log=log), strict=True)
for got, want in zip(of_ranks, (dq, dk, dv), strict=True):
    assert np.allclose(np.concatenate(got, axis=2), want, atol=1e-13, rtol=0)
print(len(log), "messages")
assert len(log) == 2 * P * (P - 1) == 24

# %% [markdown]
# **Predict.** With two heads, two queries per rank, $D = 4$, $D_V = 3$, and fp64, how many bytes
# has each message?
#
# <details><summary>Reasoning</summary>
#
# A row of a block has $D$ numbers of `q`, $D_V$ of `dout` and one each of `lse` and `delta`; a row
# of `dq` has $D$. Two heads of two queries are four rows, of 8-byte numbers:
# $4 \cdot 9 \cdot 8 = 288$ and $4 \cdot 4 \cdot 8 = 128$.
#
# </details>

# %%
of_blocks, of_dq = ({m.nbytes for m in log if m.tag == tag} for tag in (BLOCKS, RESULTS))
print("blocks", of_blocks, "  dq", of_dq)
assert (of_blocks, of_dq) == ({288}, {128})

# %% [markdown]
# ## The cost of sending `out`
#
# A backward could also send `out` with the block instead of `delta`; then every rank recomputes
# `delta` for every visiting block. In bf16, with $D = D_V = 128$, a number has 2 bytes, and 4 in
# `lse`, `delta` and `dq`, which are in fp32.
#
# **Predict.** By how much do the bytes grow?
#
# <details><summary>Reasoning</summary>
#
# A row takes $256 + 256 + 4 + 4 + 512 = 1032$ bytes. `out` adds 256 and saves the 4 of `delta`:
# 24 %.
#
# </details>
#
# The plan lists every message of every schedule. Below is one layer of Llama 3-V with 2,048 text
# tokens and 64 frames on 8 ranks.

# %%
model = MODELS["llama3v"]
shapes = model.shapes(text_tokens=2048, frames=64)
sent = {}
for schedule in ("lv-xattn", "ring"):
    layout = planned(*shapes, 8, schedule=schedule)
    sent[schedule] = sum(m.nbytes for m in messages(layout, rank=0, backward=True))

# %%
rows_sent = 7 * model.heads * 2048 // 8  # of queries, over 7 hops
out_instead = sent["lv-xattn"] + rows_sent * (128 * 2 - 4)
assert sent["lv-xattn"] == rows_sent * 1032
assert 1.24 < out_instead / sent["lv-xattn"] < 1.25
assert sent["ring"] > 50 * out_instead

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 3.1))
bytes_of = {"q": 256, "dout": 256, "lse, delta": 8, "dq": 512}
with_out = {"q": 256, "dout": 256, "lse": 4, "out": 256, "dq": 512}
shade = {"q": BLUE, "dout": COLOURS[4], "dq": GREEN, "out": RED}
for bar, pieces in enumerate((bytes_of, with_out)):
    start = 0
    for name, row in pieces.items():
        width = rows_sent * row / 1e6
        axes.barh(bar, width, left=start, color=shade.get(name, INK), height=0.6)
        if name in shade:
            axes.text(
                start + width / 2, bar, name, color="white", ha="center", va="center", size=13
            )
        start += width
axes.set(yticks=(0, 1, 2), yticklabels=("LV-XAttn", "LV-XAttn with out", "Ring Attention"),
         xlim=(0, 78), ylim=(2.5, -0.5),
         xlabel="MB sent by a rank in one layer's backward")  # fmt: skip
axes.barh(2, 78, color="#CCCCCC", height=0.6)
times = round(sent["ring"] / sent["lv-xattn"])
axes.text(77, 2, f"{sent['ring'] / 1e6:,.0f} MB: the bar is {times} times as long as the first →",
          ha="right", va="center", color=INK, size=11)  # fmt: skip
axes.tick_params(axis="y", length=0)
plt.show()

# %% [markdown]
# The thin black stripe is `lse` and `delta`. Half of the bytes are `dq`, in fp32; the last section
# of this notebook explains why it is not sent in half precision.
#
# ### Exercise 2: bytes of a backward
#
# Write `backward_bytes`: the bytes that all P ranks together send in one backward of LV-XAttn.
# `itemsize` is the size of a number of `q` and `dout`, `wide` that of `lse`, `delta` and `dq`, in
# bytes. Every rank has `s_q` queries.


# %% tags=["exercise"]
def backward_bytes(P, B, H, s_q, D, D_V, itemsize, wide):
    """Return the bytes that all ranks send."""
    raise NotImplementedError("backward_bytes is not implemented")


# %% tags=["check"]
with check("the bytes that were sent"):
    logged = sum(message.nbytes for message in log)
    got = backward_bytes(P=4, B=1, H=2, s_q=2, D=4, D_V=3, itemsize=8, wide=8)
    assert got == logged, f"the log above: expected {logged:,} bytes, got {got:,}"
    layer = 8 * sent["lv-xattn"]
    got = backward_bytes(P=8, B=1, H=32, s_q=256, D=128, D_V=128, itemsize=2, wide=4)
    assert got == layer, f"the layer of Llama 3-V: expected {layer:,} bytes, got {got:,}"
    got = backward_bytes(P=8, B=3, H=32, s_q=256, D=128, D_V=128, itemsize=2, wide=4)
    assert got == 3 * layer, f"with B = 3: expected {3 * layer:,} bytes, got {got:,}"
    got = backward_bytes(P=1, B=1, H=32, s_q=256, D=128, D_V=128, itemsize=2, wide=4)
    assert got == 0, f"one rank alone: expected 0 bytes, got {got:,}"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def backward_bytes(P, B, H, s_q, D, D_V, itemsize, wide):
#     """Return the bytes that all ranks send."""
#     block = (D + D_V) * itemsize + 2 * wide
#     return P * (P - 1) * B * H * s_q * (block + D * wide)
# ```
#
# </details>

# %% [markdown]
# ## dq is summed on the way
#
# The `dq` of rank 0 starts on rank 1, and every rank that the block visits adds its contribution.
#
# **Predict.** When it leaves rank 2, the contributions of which ranks does it contain? And which
# rank's contribution is never sent?
#
# <details><summary>Reasoning</summary>
#
# Those of ranks 1 and 2. Rank 0 computes its own contribution, and adds it at the end.
#
# </details>
#
# To inspect the messages, pass the ranks a communicator that applies a function to every result
# before it is sent.


# %%
class Wire:
    """A rank's communicator that applies a function to every result before it is sent."""

    def __init__(self, comm, through):
        self.rank, self.size, self.host = comm.rank, comm.size, comm.host
        self.recv, self.allgather = comm.recv, comm.allgather
        self.comm, self.through = comm, through

    def send(self, arrays, dest, tag=0):
        """Send the arrays; of a result, what the function returns."""
        arrays = [self.through(x) for x in arrays] if tag == RESULTS else arrays
        self.comm.send(arrays, dest, tag)


# %%
def recorded(comm):
    """Return the results that a rank sends, in order."""
    seen = []
    backward(Wire(comm, lambda x: seen.append(x.copy()) or x))
    return seen


# %%
left_rank = run_ranks(P, recorded)
for owner in range(P):
    b = np.s_[:, :, 2 * owner : 2 * owner + 2]  # the owner's queries
    for hop in range(1, P):
        visited = [(owner + n) % P for n in range(1, hop + 1)]
        collected = sum(shares[rank][b] for rank in visited)
        assert np.allclose(left_rank[visited[-1]][hop - 1], collected, atol=1e-13, rtol=0)
    assert np.allclose(collected + shares[owner][b], dq[b], atol=1e-13, rtol=0)

# %% [markdown]
# The picture is drawn from the log: which rank computes with whose queries at which hop. Its boxes
# are the sums that were just checked.


# %% tags=["hide-input"]
def draw_stop(axes, hop, rank, owner):
    """Draw a block on a rank, and below it the ranks that have added to its dq."""
    bold = owner == 0
    disc = Ellipse((hop, rank - 0.1), 0.34, 0.4, color=COLOURS[owner], alpha=1 if bold else 0.3)
    axes.add_patch(disc)
    text = {"ha": "center", "va": "center", "color": "white" if bold else INK, "size": 13}
    axes.text(hop, rank - 0.1, f"$q_{owner}$", **text)
    there = {(owner + n) % P for n in range(1, hop + 1)}
    for keys in range(P):
        style = {"fc": COLOURS[keys] if keys in there else "none", "ec": INK if bold else "#BBBBBB"}
        corner = hop - 0.26 + 0.13 * keys, rank + 0.17
        axes.add_patch(Rectangle(corner, 0.12, 0.14, alpha=1 if bold else 0.4, **style))


# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 4.6))
at_home = {(hop, rank): rank for hop in (0, P) for rank in range(P)}
for (hop, rank), owner in {**at_home, **follow(log, BLOCKS)}.items():
    draw_stop(axes, hop, rank, owner)
arrow = {"arrowstyle": "-|>", "color": BLUE, "lw": 2}
for hop in (1, 2):
    axes.annotate("", (hop + 0.7, hop + 1.2), (hop + 0.29, hop + 0.26), arrowprops=arrow)
axes.plot((3.29, 3.5), (3.26, 3.55), color=BLUE, lw=2)
axes.annotate("", (3.72, 0.2), (3.5, -0.42), arrowprops=arrow)
axes.set(xlim=(-0.45, P + 0.4), ylim=(P - 0.4, -0.5), xticks=range(P + 1),
         xticklabels=["owner", "hop 1", "hop 2", "hop 3", "owner"], yticks=range(P),
         yticklabels=[f"rank {rank}\n$k_{rank}\\ v_{rank}$" for rank in range(P)])  # fmt: skip
axes.tick_params(length=0)
axes.xaxis.tick_top()
for text, colour in zip(axes.get_yticklabels(), COLOURS, strict=False):
    text.set_color(colour)
axes.spines[["left", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# Follow $q_0$, in full colour. The four boxes are its `dq`: a box is filled once the rank of that
# colour has added its contribution. The arrows are the three hops of `dq`. The last one leads from
# rank 3 to rank 0, which adds its own contribution, computed while the block travelled. In every
# column each rank has a block to compute with, and no two ranks have the same.
#
# ## A loss that uses lse
#
# Some training runs add a z-loss, which keeps the denominator of the softmax near 1: $\mathcal{L} =
# \dots + \tfrac{w}{2} \sum \mathrm{lse}^2$. Then lse has a gradient, $\mathrm{dlse} = w\,
# \mathrm{lse}$. Since $\partial\, \mathrm{lse} / \partial s_j = p_j$, it adds $p_j\, \mathrm{dlse}$
# to $ds_j = p_j\,(dp_j - \delta)$.
#
# ### Exercise 3: the z-loss in delta
#
# Write `delta_with_z_loss`, so that the backward is unchanged except for this delta, and no other
# array has to be sent.


# %% tags=["exercise"]
def delta_with_z_loss(dout, out, lse, w):
    """Return the delta of a loss to which w / 2 times the sum of lse squared is added."""
    raise NotImplementedError("delta_with_z_loss is not implemented")


# %% tags=["check"]
with check("delta contains the z-loss"):
    new = delta_with_z_loss(dout, out, lse, 0.1)
    assert new.shape == lse.shape, f"expected shape {lse.shape}, got {new.shape}"
    keep = np.zeros_like(k), np.zeros_like(v)
    got = block_attention_backward(dout, q, k, v, lse, new, *keep, scale=scale)
    h, t = 1e-5, np.random.default_rng(2).standard_normal(q.shape)
    there, back = (full_attention(q + x * t, k, v, scale=scale) for x in (h, -h))
    rise = [(dout * o).sum() + 0.05 * (x**2).sum() for o, x in (there, back)]
    rate = (rise[0] - rise[1]) / (2 * h)
    text = f"expected the loss to rise at {rate:.6f} along t, got dq . t = {(got * t).sum():.6f}"
    assert abs((got * t).sum() - rate) < 1e-7, text

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def delta_with_z_loss(dout, out, lse, w):
#     """Return the delta of a loss to which w / 2 times the sum of lse squared is added."""
#     return (dout * out).sum(axis=-1) - w * lse
# ```
#
# </details>

# %% [markdown]
# ## Why dq is sent in fp32
#
# `dq` is half of the bytes, and q, k and v are in half precision. But `dq` is a running sum: in
# half precision it would be rounded at every hop, not once.
#
# **Predict.** How many times the error on two ranks is the error on 32 ranks?
#
# <details><summary>Reasoning</summary>
#
# A sum over $h$ of $P$ contributions of equal size has about $\sqrt{h / P}$ of the final size, and
# its rounding error is proportional to that. Independent errors add as squares:
# $\sqrt{\sum_{h=1}^{P-1} h / P} = \sqrt{(P - 1) / 2}$ roundings. From 2 to 32 ranks that grows by
# $\sqrt{31} = 5.6$.
#
# </details>
#
# The next cells use `Wire` with a function that rounds. Everything else is in fp64, so that only
# these rounding errors are measured.

# %%
long = [rng.standard_normal((2, 2, n, 16)) for n in (64, 1024, 1024, 64)]
long_out, long_lse = full_attention(*long[:3])
long_dq = full_attention_backward(long[3], *long[:3], long_out, long_lse)[0]


def error_on(P, dtype):
    """Return the relative error of dq if it is sent round P ranks in this dtype."""

    def on_a_rank(comm):
        mine = [shard(x, comm) for x in (long[3], *long[:3], long_out, long_lse)]
        wire = Wire(comm, lambda x: x.astype(dtype).astype(np.float64))
        return cross_attention_backward(*mine, wire)[0]

    found = np.concatenate(run_ranks(P, on_a_rank), axis=2)
    return np.linalg.norm(found - long_dq) / np.linalg.norm(long_dq)


# %% [markdown]
# The error of rounding to nearest is at most half a step: relative to the number, between $u / 2$
# and $u$, where $u$ is $2^{-24}$ in fp32, $2^{-11}$ in fp16 and $2^{-8}$ in bf16. Its root mean
# square is smaller by a factor of $\sqrt{3}$, so between $u / \sqrt{12}$ and $u / \sqrt{3}$ for one
# rounding; this is the band in the picture.

# %%
ranks = np.array([2, 4, 8, 16, 32])
dtypes = {"fp32": (np.float32, 2.0**-24), "fp16": (np.float16, 2.0**-11)}
dtypes["bf16"] = ml_dtypes.bfloat16, 2.0**-8
measured = {name: [error_on(P, dtype) for P in ranks] for name, (dtype, _) in dtypes.items()}
for name, (_, u) in dtypes.items():
    roundings = u * np.sqrt((ranks - 1) / 2)
    assert (roundings / 12**0.5 < measured[name]).all()
    assert (measured[name] < roundings / 3**0.5).all()

# %%
once = np.linalg.norm(long_dq.astype(ml_dtypes.bfloat16).astype(float) - long_dq)
once /= np.linalg.norm(long_dq)
assert measured["bf16"][-1] > 3 * once
assert measured["fp32"][-1] < 1e-4 * once

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 4))
for (name, (_, u)), colour in zip(dtypes.items(), (BLUE, GREEN, ORANGE), strict=True):
    roundings = u * np.sqrt((ranks - 1) / 2)
    axes.fill_between(
        ranks, roundings / 12**0.5, roundings / 3**0.5, color=colour, alpha=0.25, lw=0
    )
    axes.loglog(ranks, measured[name], "o-", color=colour, lw=2, ms=5)
    axes.text(35, measured[name][-1], name, color=colour, size=13, va="center")
axes.axhline(once, color=INK, lw=1.2, ls=(0, (4, 3)))
axes.annotate("rounding the result once,\nat the end, to bf16", (2.3, once), (2, 8e-3), color=INK,
              size=11, arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.8})  # fmt: skip
axes.set_xscale("log", base=2)
axes.set(xlabel="P, ranks", ylabel="relative error of dq", xlim=(1.8, 50), ylim=(5e-9, 0.06),
         xticks=ranks, xticklabels=ranks)  # fmt: skip
plt.show()

# %% [markdown]
# In bf16 the error on 32 ranks is more than three times that of rounding the result once, and it
# grows with every rank. In fp32 it is four digits smaller. So all implementations send partial
# results in fp32, or in fp64 for fp64 inputs. [A larger measurement, up to 128
# ranks](../docs/precision.png), includes the forward; its figures are in
# [benchmarks/results/precision.md](../benchmarks/results/precision.md).
#
# ## Summary
#
# - With `lse` and `delta = rowsum(dout * out) - dlse`, one number per query each, every key's
#   contribution to every gradient can be computed on the rank that holds the key. The contributions
#   are added, not merged.
# - So `q`, `dout`, `lse` and `delta` travel, `dq` follows them back to their owner, `dk` and `dv`
#   are summed where they are, and `out` stays.
# - Sums that are rounded at every hop are kept in fp32: in half precision the error grows with the
#   square root of the number of hops.
#
# Code: the two passes are in [reference/lv_xattn.py](../reference/lv_xattn.py), the gradients of
# one block in [reference/block_attention.py](../reference/block_attention.py), unsharded gradients
# in [reference/full_attention.py](../reference/full_attention.py). That `out` is not sent is tested
# in [tests/test_known_defects.py](../tests/test_known_defects.py), the growth of errors in
# [tests/test_precision.py](../tests/test_precision.py).
#
# Next: [notebook 6, forgetting keys and values](06_forgetting_keys_and_values.ipynb), and
# recomputing them.
