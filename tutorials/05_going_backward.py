# %% [markdown]
# # 5. Going backward: the gradients
#
# The backward of attention takes two and a half times the arithmetic of its forward, and a wrong
# gradient raises no error. If each of four ranks is given the lse of its own keys instead of that
# of all keys, every array has the right shape, and `dv` is four times as large as it should be.
#
# **You will be able to**
#
# - derive every gradient of attention, and check it without a formula;
# - say which four arrays travel in the backward over many ranks, how many bytes they have, and why
#   `out` is not one of them;
# - explain why the gradients of parts are added, while the results of parts had to be merged.
#
# **Prerequisites.** [Notebook 1](01_merging_softmax.ipynb) for `(out, lse)`, [notebook
# 3](03_the_ring_in_one_process.ipynb) for the ring of virtual ranks.
#
# **Time.** About 45 minutes, and 20 for the two appendices: the precision of `dq`, and losses that
# use lse.

# %%
import ml_dtypes
import numpy as np
from exercise import check
from figures import derivatives

from lvxattn.common.wire import BLOCKS, RESULTS
from lvxattn.plan import MODELS, messages, planned

# %%
from lvxattn.reference import (
    block_attention,
    block_attention_backward,
    cross_attention_backward,
    full_attention,
    full_attention_backward,
    run_ranks,
    shard,
)

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
print("p has shape", p.shape, "and p v is out, to 13 digits after the point")

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
print("every row of the 8 x 8 Jacobian sums to 0, up to 1e-15")

# %% [markdown]
# Central differences check the derivative: change each score by a small step to both sides, and
# measure the change of the weights.

# %%
step = 1e-5
moves = [(weights_of(eight + e) - weights_of(eight - e)) / (2 * step) for e in step * np.eye(8)]
error = abs(np.stack(moves, axis=1) - jacobian).max()
assert error < 1e-9
print("central differences and the Jacobian differ by less than 1e-9")

# %%
derivatives.jacobian(p_8, jacobian)

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
assert np.allclose(delta, over_all_keys, atol=1e-13, rtol=0)
print("delta", delta.shape, "is the same from", dp.shape, "products and from out alone")

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
# Write them in terms of `lse` and `delta`, without `out` and without a softmax. Then they are right
# for a part of the keys as well, if `lse` and `delta` are over all. Every key-value head has one
# query head here. Leave the arguments as they are.


# %% tags=["exercise"]
def gradients(dout, q, k, v, lse, delta, scale):
    """Return dq, dk and dv."""
    raise NotImplementedError("gradients is not implemented")


# %% tags=["check", "hide-input"]
with check(
    "dq, dk and dv, for all keys and for a part",
    hide="q k v dout out lse delta s p dp over_all_keys scale full_attention block_attention "
    "full_attention_backward block_attention_backward cross_attention_backward",
):

    def trial(case, B, H, S_Q, S_KV, D, D_V, scale, keys):
        """Compare the gradients of the first keys; lse and delta are over all."""
        from lvxattn import reference as library

        random = np.random.default_rng(1)
        q, dout = (random.standard_normal((B, H, S_Q, width)) for width in (D, D_V))
        k, v = (random.standard_normal((B, H, S_KV, width)) for width in (D, D_V))
        out, lse = library.full_attention(q, k, v, scale=scale)
        given = dout, q, k[:, :, :keys], v[:, :, :keys], lse, (dout * out).sum(axis=-1)
        dk, dv = np.zeros_like(given[2]), np.zeros_like(given[3])
        dq = library.block_attention_backward(*given, dk, dv, scale=scale)
        copies = [x.copy() for x in given]
        with np.errstate(all="ignore"):
            got = gradients(*copies, scale)
        for name, x, copy in zip(
            ("dout", "q", "k", "v", "lse", "delta"), given, copies, strict=True
        ):
            assert np.array_equal(x, copy), f"{name} was changed in place, and is needed again"
        assert isinstance(got, tuple | list) and len(got) == 3, "expected dq, dk and dv"
        for name, g, w in zip(("dq", "dk", "dv"), got, (dq, dk, dv), strict=True):
            assert np.shape(g) == w.shape, (
                f"{case}: {name}: expected shape {w.shape}, got {np.shape(g)}"
            )
            wrong = np.argwhere(~(abs(g - w) <= 1e-9 * max(1, scale)))
            if len(wrong):
                b, h, row, _ = wrong[0]
                raise AssertionError(
                    f"{case}: {name}[{b}, {h}, {row}]: expected {w[b, h, row].round(5)}, "
                    f"got {g[b, h, row].round(5)}"
                )

    trial("24 keys, scale 0.5", 1, 2, 8, 24, 4, 3, 0.5, keys=24)
    trial("B = 2, scale 0.3", 2, 3, 5, 9, 6, 2, 0.3, keys=9)
    trial("4 of 9 keys, and lse and delta of all 9", 2, 3, 5, 9, 6, 2, 0.3, keys=4)
    trial("scores near 1000", 1, 1, 4, 6, 3, 5, 500.0, keys=6)

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
print("at the best step, all three gradients are confirmed to ten digits")
for name in ("q", "k"):  # from 1e-2 to 1e-3
    assert 80 < errors[name][-3] / errors[name][-5] < 125
print("q and k: a step ten times smaller has a truncation error about 100 times smaller")
assert errors["v"][-1] < 1e-13
print("v: at the largest step the error is below 1e-13")

# %% tags=["varies"]
derivatives.errors_of_differences(steps, errors)

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
print("dq is the sum of", len(shares), "parts, and dk and dv are complete, to 1e-13")

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
print("the weights of each rank's keys sum to exp(lse of the rank - lse), and in total to 1")

# %%
wrong = np.zeros_like(v)
for r, lse_r in zip(rows, own, strict=True):
    block_attention_backward(dout, q, k[r], v[r], lse_r, delta, dk_sum[r], wrong[r], scale=scale)
ratio = np.linalg.norm(wrong) / np.linalg.norm(dv)
assert 3.5 < ratio < 4.5
print(f"given the lse of each part alone, dv is {ratio:.0f} times as large as it should be")

# %%
derivatives.weights_by_rank(p[0, 0], part_of[:, 0, 0])

# %% [markdown]
# Left: $p$ of the first head, darker is larger. Given `lse`, a rank's columns do not depend on data
# of other ranks. Right: the sums over each rank's columns, which are the weights of the merge,
# $e^{\mathrm{lse}_r - \mathrm{lse}}$ for rank $r$.
#
# <div class="alert alert-info">
#
# **Takeaway.** With the lse over all keys, the weight of a key can be computed where the key is,
# without any other key. So in the backward the contributions of parts are added, not merged.
#
# </div>
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
print("four blocks of two queries, one after the other, add up to the same dk and dv")

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
assert len(log) == 2 * P * (P - 1) == 24
print("the gradients of", P, "ranks are those of one process, with", len(log), "messages")

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
assert (of_blocks, of_dq) == ({288}, {128})
print("bytes of every block:", *of_blocks, "  of every dq:", *of_dq)

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
growth, times = out_instead / sent["lv-xattn"] - 1, sent["ring"] / sent["lv-xattn"]
assert 0.24 < growth < 0.25 and times > 70
print(f"out instead of delta: {growth:.0%} more bytes; Ring Attention: {times:.0f} times as many")

# %%
derivatives.bytes_of_a_backward(rows_sent, sent["ring"])

# %% [markdown]
# The thin black stripe is `lse` and `delta`. Half of the bytes are `dq`, in fp32; appendix A
# explains why it is not sent in half precision.
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


# %% tags=["check", "hide-input"]
from lvxattn import plan


def trial(case, P, B, H, s_q, D, D_V, dtype, itemsize, wide, plan=plan):
    """Compare the bytes of all messages."""
    layout = plan.planned(
        (B, H, P * s_q, D), (B, H, 3 * P, D), P, D_V=D_V, dtype=dtype, schedule="lv-xattn"
    )
    of_ranks = [
        sum(m.nbytes for m in plan.messages(layout, rank, backward=True)) for rank in range(P)
    ]
    want = sum(of_ranks)
    got = backward_bytes(P=P, B=B, H=H, s_q=s_q, D=D, D_V=D_V, itemsize=itemsize, wide=wide)
    assert isinstance(got, int | float | np.number), f"expected a number, got {got}"
    hint = ", which is what one rank sends" if got == of_ranks[0] else ""
    assert got == want, (
        f"{case} (P = {P}, B = {B}, D = {D}, D_V = {D_V}, itemsize = {itemsize}, "
        f"wide = {wide}): expected {want:,} bytes, got {got:,}{hint}"
    )


with check(
    "the bytes of every message of all ranks",
    hide="log sent rows_sent out_instead shapes layout model MODELS",
    hide_packages="lvxattn",
):
    trial("the log above", 4, 1, 2, 2, 4, 3, "float64", itemsize=8, wide=8)
    trial("the layer of Llama 3-V", 8, 1, 32, 256, 128, 128, "bfloat16", itemsize=2, wide=4)
    trial("two numbers of columns", 5, 2, 3, 7, 24, 10, "bfloat16", itemsize=2, wide=4)
    trial("more columns of values", 3, 3, 4, 1, 8, 20, "float32", itemsize=4, wide=4)
    trial("one rank alone", 1, 1, 32, 256, 128, 128, "bfloat16", itemsize=2, wide=4)

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
print("each of the", P * (P - 1), "sums sent is that of exactly the ranks visited before")

# %% [markdown]
# The picture is drawn from the log: which rank computes with whose queries at which hop. Its boxes
# are the sums that were just checked.

# %%
derivatives.journey_of_dq(log)

# %% [markdown]
# Follow $q_0$, in full colour. The four boxes are its `dq`: a box is filled once the rank of that
# colour has added its contribution. The arrows are the three hops of `dq`. The last one leads from
# rank 3 to rank 0, which adds its own contribution, computed while the block travelled. In every
# column each rank has a block to compute with, and no two ranks have the same.
#
# ## Summary
#
# <div class="alert alert-info">
#
# **Takeaways.** Of the backward over many ranks:
#
# - With `lse` and `delta = rowsum(dout * out)`, one number per query each, every key's contribution
#   to every gradient can be computed on the rank that holds the key.
# - So `q`, `dout`, `lse` and `delta` travel, `dq` follows them back to their owner, `dk` and `dv`
#   are summed where they are, and `out` stays.
# - In bf16 with $D = D_V = 128$, a query of one head takes 1,032 bytes at every hop, whatever the
#   number of keys.
#
# </div>
#
# Code: the two passes are in [reference/lv_xattn.py](../reference/lv_xattn.py), the gradients of
# one block in [reference/block_attention.py](../reference/block_attention.py), unsharded gradients
# in [reference/full_attention.py](../reference/full_attention.py). That `out` is not sent is tested
# in [tests/test_known_defects.py](../tests/test_known_defects.py), the growth of errors in
# [tests/test_precision.py](../tests/test_precision.py).
#
# Next: [notebook 6, forgetting keys and values](06_forgetting_keys_and_values.ipynb), and
# recomputing them. The appendices below may be read later.

# %% [markdown]
# ## Appendix A: why dq is sent in fp32
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
print("all", 3 * len(ranks), "measured errors lie in the band of the prediction")

# %%
once = np.linalg.norm(long_dq.astype(ml_dtypes.bfloat16).astype(float) - long_dq)
once /= np.linalg.norm(long_dq)
assert measured["bf16"][-1] > 3 * once
assert measured["fp32"][-1] < 1e-4 * once
print("bf16 on 32 ranks: more than 3 times the error of one rounding; fp32: less than 1/10,000")

# %%
derivatives.error_by_ranks(ranks, dtypes, measured, once)

# %% [markdown]
# In bf16 the error on 32 ranks is more than three times that of rounding the result once, and it
# grows with every rank. In fp32 it is four digits smaller. So all implementations send partial
# results in fp32, or in fp64 for fp64 inputs. [A larger measurement, up to 128
# ranks](../docs/precision.png), includes the forward; its figures are in
# [benchmarks/results/precision.md](../benchmarks/results/precision.md).
#
# <div class="alert alert-info">
#
# **Takeaway.** A sum that is rounded at every hop has an error that grows with the square root of
# the number of hops. So results travel in fp32, even if inputs are in half precision.
#
# </div>

# %% [markdown]
# ## Appendix B: a loss that uses lse
#
# lse is a result of attention, beside `out`, and a loss may use it. An example is a z-loss. For the
# softmax over the vocabulary, PaLM adds $10^{-4} \log^2 Z$ to the loss, where $Z$ is the
# denominator; it keeps $\log Z$ near 0 and makes training more stable (arXiv:2204.02311,
# section 5). In attention $\log Z$ is lse, and the same loss can be added: $\mathcal{L} = \dots +
# \tfrac{w}{2} \sum \mathrm{lse}^2$. Another example is a model that merges two results of
# attention with their lse, as notebook 1 does, and differentiates the merge.
#
# Then lse has a gradient; for the z-loss, $\mathrm{dlse} = w\, \mathrm{lse}$. Since
# $\partial\, \mathrm{lse} / \partial s_j = p_j$, it adds $p_j\, \mathrm{dlse}$ to
# $ds_j = p_j\,(dp_j - \delta)$.
#
# ### Exercise 3: the z-loss in delta
#
# Write `delta_with_z_loss`, so that the backward is unchanged except for this delta, and no other
# array has to be sent.


# %% tags=["exercise"]
def delta_with_z_loss(dout, out, lse, w):
    """Return the delta of a loss to which w / 2 times the sum of lse squared is added."""
    raise NotImplementedError("delta_with_z_loss is not implemented")


# %% tags=["check", "hide-input"]
with check(
    "delta contains the z-loss of every query",
    hide="q k v dout out lse delta dp p over_all_keys scale shares full_attention block_attention "
    "full_attention_backward block_attention_backward cross_attention_backward",
):

    def trial(w, B, H, S_Q, S_KV, D, D_V):
        """Compare the slope of each query's loss, along a random t, with central differences."""
        from lvxattn import reference as library

        random, scale, h = np.random.default_rng(2), 0.5, 1e-5
        q, dout, t = (random.standard_normal((B, H, S_Q, width)) for width in (D, D_V, D))
        k, v = (random.standard_normal((B, H, S_KV, width)) for width in (D, D_V))
        out, lse = library.full_attention(q, k, v, scale=scale)
        before = dout.copy(), out.copy(), lse.copy()
        new = delta_with_z_loss(dout, out, lse, w)
        for name, x, old in zip(("dout", "out", "lse"), (dout, out, lse), before, strict=True):
            assert np.array_equal(x, old), f"{name} was changed in place, and is needed again"
        assert np.shape(new) == lse.shape, f"expected shape {lse.shape}, got {np.shape(new)}"
        dk_dv = np.zeros_like(k), np.zeros_like(v)
        dq = library.block_attention_backward(dout, q, k, v, lse, new, *dk_dv, scale=scale)
        got = (dq * t).sum(axis=-1)
        moved = (library.full_attention(q + x * t, k, v, scale=scale) for x in (h, -h))
        there, back = ((dout * o).sum(axis=-1) + w / 2 * x**2 for o, x in moved)
        want = (there - back) / (2 * h)
        wrong = np.argwhere(~(abs(got - want) < 1e-7))
        if len(wrong):
            at = tuple(int(n) for n in wrong[0])
            raise AssertionError(
                f"w = {w}: the loss of query {at} (video, head, query) changes at the rate "
                f"{want[at]:.5f} along t; this delta gives dq . t = {got[at]:.5f}"
            )

    trial(0.1, 1, 2, 8, 24, 4, 3)
    trial(0.45, 2, 3, 5, 7, 3, 6)
    trial(0.0, 1, 1, 4, 6, 2, 2)

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
# <div class="alert alert-info">
#
# **Takeaway.** A gradient of lse needs no message of its own. It is subtracted from `delta`, once,
# on the rank that owns the query.
#
# </div>
#
# Next: [notebook 6, forgetting keys and values](06_forgetting_keys_and_values.ipynb), and
# recomputing them.
