# %% [markdown]
# # 1. Merging softmax: attention in pieces
#
# The keys and values of a video of 20 minutes fill more than three GPUs of 80 GB, so that attention
# has to be computed in pieces, and the pieces joined. The obvious join, the mean, is wrong by a
# quarter in the example below. The correct one takes five lines, and published code has got it
# wrong in two ways that its own test does not see.
#
# **You will be able to**
#
# - split the keys of softmax attention into pieces, attend to each, and merge the results exactly;
# - recognise four failures of such code: overflow, missing weights, a phantom key, dead rows;
# - choose tests that detect them.
#
# **Prerequisites.** Softmax attention and NumPy.
#
# **Time.** About 30 minutes, and 10 for the appendix.
#
# In all notebooks, **Predict.** marks a question. Decide on an answer before you open its
# *Reasoning* and run the next cell: wrong guesses are remembered best.

# %%
from functools import reduce
from itertools import pairwise
from math import comb, factorial
from unittest.mock import patch

import numpy as np
from exercise import check
from figures import merging

from lvxattn.reference import block_attention, full_attention, merge

# %% [markdown]
# ## Softmax attention
#
# A query $q$ scores every key, $s_j = \mathrm{scale}\; q \cdot k_j$. The result is a weighted mean
# of the values $v_j$:
#
# $$\mathrm{lse} = \log \sum_j e^{s_j} \qquad\qquad
#   \mathrm{out} = \sum_j e^{s_j - \mathrm{lse}}\, v_j$$
#
# The weights $e^{s_j - \mathrm{lse}}$ sum to 1; they are the softmax of the scores. $\mathrm{lse}$,
# log-sum-exp, is the log of its denominator ($L$ in arXiv:2307.08691, algorithm 1). Arrays have the
# axes (B, H, S, D): batch, heads, tokens, head dimension. There are `S_Q` queries and `S_KV` keys;
# values may have a different dimension `D_V`.
#
# **Predict.** What are the shapes of `out` and `lse`?
#
# <details><summary>Reasoning</summary>
#
# Every query of every head has one mean of values, of size `D_V`, and one denominator.
#
# </details>

# %%
rng = np.random.default_rng(0)
scale = 0.5
q = rng.standard_normal((1, 1, 64, 16))
k = rng.standard_normal((1, 1, 512, 16))
v = rng.standard_normal((1, 1, 512, 8))
out, lse = full_attention(q, k, v, scale=scale)
print("out", out.shape, "  lse", lse.shape)
assert out.shape == (1, 1, 64, 8)
assert lse.shape == (1, 1, 64)

# %% [markdown]
# `full_attention` is this project's ground truth: all queries, all keys, one process, fp64.
# Everything below is compared with it.
#
# ## Failure 1: overflow
#
# Implemented literally, softmax takes `exp` first and divides afterwards.
#
# **Predict.** What is the smallest integer $s$ for which $e^s$ is infinite in fp32?
#
# <details><summary>Reasoning</summary>
#
# The largest fp32 number is $3.4 \cdot 10^{38} = e^{88.7}$. In fp64 it is $e^{709.8}$.
#
# </details>

# %%
whole = np.arange(80, 100, dtype=np.float32)
with np.errstate(over="ignore"):
    first = whole[np.isinf(np.exp(whole))][0]
print("infinite from", first, "on: log of the largest fp32 number is", np.log(np.finfo("f4").max))
assert first == 89

# %% [markdown]
# Now add a constant $c$ to all scores of a query. Every $e^{s_j}$ grows by the factor $e^c$, and so
# does their sum.
#
# **Predict.** What happens to `out`, and what to `lse`?
#
# <details><summary>Reasoning</summary>
#
# The factor cancels in the weights, so `out` does not change. `lse` is the log of the sum: it
# increases by $c$.
#
# </details>
#
# An additive mask can add the constant, here 1,000, at which `exp` overflows even in fp64.

# %% tags=["varies"]
c = np.full(512, 1000.0)
out_c, lse_c = full_attention(q, k, v, scale=scale, mask=c)
print(f"out changed by {abs(out_c - out).max():.0e}, lse by {(lse_c - lse).mean():.6f}")
assert abs(out_c - out).max() < 1e-11
assert abs(lse_c - lse - 1000).max() < 1e-11

# %% [markdown]
# So any constant may be subtracted. `full_attention` subtracts each row's largest score: the
# largest exponential is then 1, nothing overflows, and terms that underflow are negligible. Below
# is the first query in fp32, with many constants added to its scores, with and without the
# subtraction.


# %%
def softmax_mean(s, v, shift):
    """Return the mean of v in the dtype of s, weighted by the exponentials of s - shift."""
    p = np.exp(s - shift)
    return p @ v / p.sum()


# %%
scores, v32 = scale * q[0, 0, 0] @ k[0, 0].T, v[0, 0].astype("f4")
levels = np.arange(-130, 131, 2)
moved = [(scores + level).astype("f4") for level in levels]
with np.errstate(all="ignore"):
    plain = np.array([abs(softmax_mean(s, v32, 0) - out[0, 0, 0]).max() for s in moved])
safe = np.array([abs(softmax_mean(s, v32, s.max()) - out[0, 0, 0]).max() for s in moved])
assert np.isnan(plain[levels > 88.7]).all()
assert np.isnan(plain[levels < -110]).all()
assert safe.max() < 1e-4
print("NaN above 88.7 and below -110 without the maximum; error below 1e-4 everywhere with it")

# %% tags=["varies"]
merging.window_of_scores(levels, plain, safe)

# %% [markdown]
# Without subtracting the maximum, softmax works only in a window of scores. (It ends below 88
# because the largest score of this query is above 0.) With it, every level works; only the rounding
# error grows, because fp32 rounds larger scores more coarsely.
#
# <div class="alert alert-info">
#
# **Takeaway.** A constant added to all scores of a query changes lse by that constant, and out not
# at all. Subtract each row's own largest score before `exp`, and no level of scores overflows.
#
# </div>
#
# ### Exercise 1: lse at every level
#
# Write `stable_lse(s)`: the log-sum-exp along the last axis, in the dtype of `s`, for scores at any
# level. `s` has one axis or more, and is not to be changed.


# %% tags=["exercise"]
def stable_lse(s):
    """Return log(sum(exp(s))) along the last axis."""
    return np.log(np.exp(s).sum(axis=-1))


# %% tags=["check", "hide-input"]
def scores_at_every_level():
    noise = np.random.default_rng(1).standard_normal
    for what, s in {
        "4 rows of scores near 0": noise((4, 512)),
        "scores near 100": 100 + noise((4, 512)),
        "scores near -200": -200 + noise((3, 512)),
        "scores from 0 to 2,000": np.linspace(0, 2000, 300),
        "one score of 2,000 among 99 of 0": np.array([*[0] * 50, 2000, *[0] * 49]),
        "scores near 20,000": 20_000 + noise((2, 7)),
        "rows near -5,000 and 5,000": noise((2, 64)) + np.array([[-5000], [5000]]),
        "scores of shape (2, 3, 50)": 90 + noise((2, 3, 50)),
        "one score a row": noise((5, 1)),
    }.items():
        for dtype in (np.float32, np.float64):
            given = s.astype(dtype)
            got = stable_lse(given)
            assert np.array_equal(given, s.astype(dtype)), f"{what}: the argument was changed"
            shape = f"{what}: expected shape {s.shape[:-1]}, got {np.shape(got)}"
            assert np.shape(got) == s.shape[:-1], shape
            got = np.asarray(got)
            assert got.dtype == dtype, f"{what}: expected {np.dtype(dtype)}, got {got.dtype}"
            top = given.max(axis=-1, keepdims=True).astype(float)
            want = top[..., 0] + np.log(np.exp(given - top).sum(axis=-1))
            off = ~(abs(got - want) <= 32 * np.finfo(dtype).eps * (1 + abs(given).max()))
            for expected, found in zip(want[off], got[off], strict=True):
                cause = {np.inf: ": exp overflows", -np.inf: ": every exp is 0"}.get(found, "")
                text = f"{what}, {got.dtype}: expected {expected:.3f}, got {found:.3f}{cause}"
                raise AssertionError(text)


with check("lse is correct at every level", hide="scores lse moved"), np.errstate(all="ignore"):
    scores_at_every_level()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def stable_lse(s):
#     """Return log(sum(exp(s))) along the last axis."""
#     largest = s.max(axis=-1, keepdims=True)
#     return largest[..., 0] + np.log(np.exp(s - largest).sum(axis=-1))
# ```
#
# </details>

# %% [markdown]
# ## Failure 2: missing weights
#
# Now split the keys into two halves. `block_attention` attends to some keys as if there were no
# others. Part $a$ gives $(\mathrm{out}_a, \mathrm{lse}_a)$, part $b$ gives $(\mathrm{out}_b,
# \mathrm{lse}_b)$. Each result is a mean over the same number of keys.
#
# **Predict.** Is the mean of the two the result over all keys?
#
# <details><summary>Reasoning</summary>
#
# Only if both parts have the same sum of exponentials. A part whose keys score higher has more
# weight, regardless of the number of its keys.
#
# </details>

# %%
half_a, half_b = np.s_[:, :, :256], np.s_[:, :, 256:]
out_a, lse_a = block_attention(q, k[half_a], v[half_a], scale=scale)
out_b, lse_b = block_attention(q, k[half_b], v[half_b], scale=scale)
mean = (out_a + out_b) / 2
error_of_mean = np.linalg.norm(mean - out) / np.linalg.norm(out)
print(f"relative error of the mean: {error_of_mean:.2f}")
assert error_of_mean > 0.1

# %% [markdown]
# The correct weights follow from the definition. $e^{\mathrm{lse}_a}$ is the sum of exponentials of
# part $a$, the denominator, so $e^{\mathrm{lse}_a}\,\mathrm{out}_a$ is the numerator. Numerators
# add, and so do denominators:
#
# $$\mathrm{out} = \frac{e^{\mathrm{lse}_a}\,\mathrm{out}_a + e^{\mathrm{lse}_b}\,\mathrm{out}_b}
#                       {e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}}$$
#
# The weight of $a$ is $1 / (1 + e^{\mathrm{lse}_b - \mathrm{lse}_a})$: it depends only on the
# difference of the two lse. To compare with attention over all keys: `out` lies on the line from
# `out_b` to `out_a`, and its position on that line is the weight.

# %%
way = out_a - out_b
weight = ((out - out_b) * way).sum(axis=-1) / (way * way).sum(axis=-1)
difference = lse_a - lse_b
assert abs(weight - 1 / (1 + np.exp(-difference))).max() < 1e-12
print(f"the weights of all {weight.size} queries follow from the lse of the parts, to 1e-12")

# %%
merging.weight_of_a_part(difference, weight)

# %% [markdown]
# Every query has its own weights for the parts, and the two lse determine them.
#
# ## The merge
#
# Dividing by $e^{\mathrm{lse}}$ early, instead of forming sums that overflow, gives the merge
# (arXiv:2502.02406, section 3), the basis of this project:
#
# $$\mathrm{lse} = \log\left(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}\right) \qquad\qquad
#   \mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}}\,\mathrm{out}_a
#                + e^{\mathrm{lse}_b - \mathrm{lse}}\,\mathrm{out}_b$$
#
# `np.logaddexp` computes the first without overflow: it, too, subtracts the larger argument.
#
# **Predict.** How large is the error now, and how large with 1,000 added to all scores?
#
# <details><summary>Reasoning</summary>
#
# The formula is exact, so only rounding errors are left, a few times $10^{-16}$. An lse near 1,000
# has steps of $10^{-13}$, and a step of lse is a relative error of the weights.
#
# </details>

# %% tags=["varies"]
merged, merged_lse = merge(out_a, lse_a, out_b, lse_b)
high, _ = merge(out_a, lse_a + 1000, out_b, lse_b + 1000)
error, error_high = abs(merged - out).max(), abs(high - out).max()
print(f"largest error {error:.0e}, at 1,000 it is {error_high:.0e}")
assert max(error, abs(merged_lse - lse).max()) < 1e-14
assert error_high < 1e-12

# %% [markdown]
# The parts may be two tiles, two kernel launches, or two machines. The merge needs neither scores
# nor keys: `out` and `lse` are enough.
#
# Numerators add, and addition is associative and commutative; so is `merge`. Parts of any length,
# one of them empty, can be merged in any order and any grouping. Ranks may finish in any order.

# %% tags=["varies"]
cuts = [0, 5, 100, 101, 230, 230, 300, 450, 512]
eight = [
    block_attention(q, k[:, :, start:stop], v[:, :, start:stop], scale=scale)
    for start, stop in pairwise(cuts)
]
forwards = reduce(lambda x, y: merge(*x, *y), eight)
backwards = reduce(lambda x, y: merge(*x, *y), eight[::-1])
worst = max(abs(found - out).max() for found, _ in (forwards, backwards))
print(f"8 parts of {min(np.diff(cuts))} to {max(np.diff(cuts))} keys: largest error {worst:.0e}")
assert worst < 1e-14

# %% [markdown]
# The [appendix](#appendix-orders-trees-and-units-of-u) tries 200 orders and derives a bound of the
# error.
#
# <div class="alert alert-info">
#
# **Takeaway.** The pair `(out, lse)` is all that attention over some keys has to hand on. Two such
# pairs merge exactly, in any order and grouping; their weights follow from the difference of the
# two lse.
#
# </div>
#
# ## Failure 3: an accumulator that starts with lse = 0
#
# Most programs merge in a loop: an accumulator starts empty, and one part after the other is merged
# into it.
#
# **Predict.** What are `out` and `lse` of attention over no keys?
#
# <details><summary>Reasoning</summary>
#
# The sum of no exponentials is 0, and log 0 = -inf. The sum of no values is 0. So the result is
# `(0, -inf)`, and its weight in a merge is $e^{-\infty} = 0$: it is the identity of the merge.
#
# </details>

# %%
nothing = np.zeros_like(out), np.full_like(lse, -np.inf)
same_out, same_lse = merge(*nothing, out, lse)
assert np.array_equal(same_out, out)
assert np.array_equal(same_lse, lse)
empty = block_attention(q, k[:, :, :0], v[:, :, :0], scale=scale)
assert np.array_equal(empty[1], nothing[1])
assert not empty[0].any()
print("attention over no keys is (0, -inf); merging with (0, -inf) changes no bit")

# %% [markdown]
# Buffers are often allocated as zeros. But $e^0 = 1$: an accumulator that starts with lse = 0
# counts a phantom key with score 0 and value 0. The code published with the paper does: in
# [lv_xattn/attn.py](https://github.com/uw-mad-dash/LV-XAttn/blob/917fa09c159354ec17206903ae23c221fb7e645e/lv_xattn/attn.py)
# (commit 917fa09) `_attn_forward` allocates `L` with `zeros_like`, and merges the first part into
# it. It also merges by `log(exp + exp)`, without the maximum: failure 1.
#
# **Predict.** What is the relative error of `out` if the true lse is 0? If it is 4?
#
# <details><summary>Reasoning</summary>
#
# The phantom key has weight $1 / (1 + e^{\mathrm{lse}})$ and value 0, so `out` shrinks by that
# fraction: a half at 0, and 1.8 % at 4.
#
# </details>
#
# The lse of the parts can be set freely here: a constant added to all scores changes lse, and not
# out.

# %%
true_lse = np.linspace(-4, 12, 33)
phantom = np.zeros_like(out), np.zeros_like(lse)
found = [merge(*phantom, out, np.full_like(lse, level))[0] for level in true_lse]
relative = np.array([np.linalg.norm(x - out) / np.linalg.norm(out) for x in found])
assert np.allclose(relative, 1 / (1 + np.exp(true_lse)), rtol=1e-9)
for level in (0, 4):
    print(f"true lse {level}: relative error {relative[true_lse == level][0]:.3f}")

# %%
passes = np.array([np.allclose(x, out, atol=1e-2) for x in found])
usual = np.log(4096) + 0.5  # 4,096 keys with scores of variance 1: log n plus half the variance
assert passes[true_lse > usual].all()
assert not passes[true_lse <= 4].any()
print(f"allclose(atol=1e-2) passes from lse {true_lse[passes][0]} on; 4,096 keys have {usual:.1f}")

# %%
merging.phantom_key(true_lse, relative, passes, usual)

# %% [markdown]
# The error is large if scores are low or keys are few. The usual first test, with many random keys
# and a generous tolerance, does not detect it: that of the published code has 4,096 keys and
# `atol=1e-2`. Few keys, or scores that bring lse near 0, detect it.
#
# ### Exercise 2: tile by tile
#
# Write `in_tiles(q, k, v, scale, tile)`: attention over all keys, with `block_attention` on at
# most `tile` keys at a time, joined by `merge`. The last tile may be shorter, and there may be no
# keys at all. Scores may be at any level. Query heads may share key-value heads; `block_attention`
# takes care of that.


# %% tags=["exercise"]
def in_tiles(q, k, v, scale, tile):
    """Return (out, lse), `tile` keys at a time."""
    raise NotImplementedError("in_tiles is not implemented")


# %% tags=["check", "hide-input"]
def keys_in_tiles():
    from lvxattn.reference import block_attention as attend
    from lvxattn.reference import full_attention as over_all

    noise, some_scale, most_blocks = np.random.default_rng(2).standard_normal, 0.3, 1000
    # Heads, key-value heads, keys, D_V, tile, and the scores of the first and the last key.
    for H, H_KV, S_KV, D_V, tile, first, last in [
        (1, 1, 0, 8, 8, 0, 0), (1, 1, 3, 8, 8, 0, 0), (1, 1, 10, 1, 4, 0, 0),
        (1, 1, 5, 9, 1, -4, -4), (4, 2, 50, 5, 7, 0, 0), (2, 2, 64, 8, 16, 1000, 1000),
        (2, 1, 64, 8, 16, -1000, -1000), (1, 1, 60, 8, 16, -2000, 2000),
        (1, 1, 60, 8, 16, 2000, -2000),
    ]:  # fmt: skip
        where = f"{S_KV} keys in tiles of {tile}, scores near {first} to {last}"
        queries, keys = noise((2, H, 3, 6)), noise((2, H_KV, S_KV, 6))
        queries[..., 0], keys[..., 0] = 1, np.linspace(first, last, S_KV) / some_scale
        values, seen = noise((2, H_KV, S_KV, D_V)), []

        def counted(q, k, v, *, scale, mask=None, seen=seen, where=where):
            seen.append(k.shape[2])
            assert len(seen) <= most_blocks, f"{where}: over {most_blocks} blocks"
            out, lse = attend(q, k, v, scale=scale, mask=mask)
            # So are the merged ones, and those of no other attention.
            return (out + 0.5, lse + 0.25) if k.shape[2] else (out, lse)

        with patch("__main__.block_attention", counted):
            result = in_tiles(queries, keys, values, some_scale, tile)
        assert result is not None, f"{where}: nothing is returned"
        got_out, got_lse = result
        assert max(seen, default=0) <= tile, f"{where}: one block has {max(seen)} keys"
        assert sum(seen) == S_KV, f"{where}: the blocks have {sum(seen)} keys together"
        assert got_out is not None, f"{where}: expected out 0 and lse -inf, got None"
        want_out, want_lse = over_all(queries, keys, values, scale=some_scale)
        if S_KV:
            want_out, want_lse = want_out + 0.5, want_lse + 0.25
        for name, got, want in (("lse", got_lse, want_lse), ("out", got_out, want_out)):
            shape = f"{where}: expected {name} of shape {want.shape}, got {np.shape(got)}"
            assert np.shape(got) == want.shape, shape
            off = ~np.isclose(got, want, atol=1e-11, rtol=1e-12)
            if off.any():
                wrong = f"{where}: expected {name} {want[off][0]:.4f}, got {got[off][0]:.4f}"
                phantom = np.allclose(got_lse, np.logaddexp(want_lse, 0), rtol=1e-9)
                assert not phantom, f"{wrong}: a phantom key of score 0 is counted"
                raise AssertionError(wrong)


with (
    check(
        "tiles are merged from nothing to the last key", hide="q k v scale out lse full_attention"
    ),
    np.errstate(all="ignore"),
):
    keys_in_tiles()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def in_tiles(q, k, v, scale, tile):
#     """Return (out, lse), `tile` keys at a time."""
#     out = np.zeros((*q.shape[:3], v.shape[3]))
#     lse = np.full(q.shape[:3], -np.inf)
#     for start in range(0, k.shape[2], tile):
#         keys = np.s_[:, :, start : start + tile]
#         out, lse = merge(out, lse, *block_attention(q, k[keys], v[keys], scale=scale))
#     return out, lse
# ```
#
# </details>

# %% [markdown]
# ## Failure 4: dead rows
#
# A mask can hide every key from a query, for example from padding, or from a token before the first
# frame of its video. Here token $i$ may attend to the frames $j < 2i$, which come before it, and
# the frames are in four parts of four keys.
#
# **Predict.** What are `out` and `lse` of token 0?
#
# <details><summary>Reasoning</summary>
#
# Those of attention over no keys, `(0, -inf)`: absent and hidden keys are equivalent.
#
# </details>

# %%
few_q, few_k, few_v = q[:, :, :8], k[:, :, :16], v[:, :, :16]
visible = (np.arange(16) < 2 * np.arange(8)[:, None])[None, None]  # (B, H, S_Q, S_KV)
fours = [np.s_[:, :, start : start + 4] for start in range(0, 16, 4)]
parts = [
    block_attention(few_q, few_k[f], few_v[f], scale=scale, mask=visible[..., f[2]]) for f in fours
]
out_seen, lse_seen = reduce(lambda x, y: merge(*x, *y), parts)
print(f"token 0: out {abs(out_seen[0, 0, 0]).max()}, lse {lse_seen[0, 0, 0]}")
assert lse_seen[0, 0, 0] == -np.inf
assert not out_seen[0, 0, 0].any()

# %%
want_out, want_lse = full_attention(few_q, few_k, few_v, scale=scale, mask=visible)
assert np.isfinite(lse_seen[0, 0, 1:]).all()
assert np.allclose(out_seen, want_out, atol=1e-14, rtol=0)
assert np.allclose(lse_seen, want_lse, atol=1e-14, rtol=0)
print("the four parts, merged, are attention under the whole mask to 1e-14, and no row is NaN")

# %%
lses = [part_lse[0, 0] for _, part_lse in [*parts, (out_seen, lse_seen)]]
merging.dead_rows(visible[0, 0], lses)

# %% [markdown]
# Most tokens see no key of some part, and token 0 sees none of any part. There the literal formula
# of the merge fails: $e^{-\infty - (-\infty)}$ is NaN. `merge` subtracts 0 instead, so that both
# weights are 0.

# %%
with np.errstate(invalid="ignore"):
    literal = np.exp(-np.inf - np.logaddexp(-np.inf, -np.inf))
print("weight by the literal formula:", literal)
assert np.isnan(literal)
assert np.isfinite(merge(*parts[0], *parts[1])[0]).all()

# %% [markdown]
# A common workaround is to mask with a large negative number, for example -1e9, instead of
# $-\infty$.
#
# **Predict.** What is `out` of token 0 then?
#
# <details><summary>Reasoning</summary>
#
# -1e9 is added to all of its scores, and a constant cancels. The result is that of no mask.
#
# </details>

# %%
minus_1e9 = np.where(visible, 0.0, -1e9)
leaked, _ = full_attention(few_q, few_k, few_v, scale=scale, mask=minus_1e9)
everything, _ = full_attention(few_q, few_k, few_v, scale=scale)
print("token 0 attends to all hidden keys:", np.allclose(leaked[0, 0, 0], everything[0, 0, 0]))
assert np.allclose(leaked[0, 0, 0], everything[0, 0, 0], atol=1e-5)

# %% [markdown]
# The result is not NaN, but wrong: it contains the hidden values.
#
# ### Exercise 3: all parts at once
#
# A reduction over machines may have all parts at the same time. Write `merge_all(outs, lses)`:
# `outs` is (n, B, H, s_q, D_V) and `lses` (n, B, H, s_q); return the merge of all n parts. Dead
# rows give `(0, -inf)`, and lse may be at any level, another one in each row and part.


# %% tags=["exercise"]
def merge_all(outs, lses):
    """Return (out, lse) over the keys of all n parts."""
    return outs.mean(axis=0), np.log(np.exp(lses).sum(axis=0))


# %% tags=["check", "hide-input"]
def parts_at_once():
    from functools import reduce as fold

    from lvxattn.reference import merge as join

    noise = np.random.default_rng(3).standard_normal
    spread = np.linspace(-2000, 2000, 5)
    for what, n, D_V, level, dead in (
        ("parts with a dead row", 4, 8, 0, np.s_[:, 0, 0, 0]),
        ("parts with a row that only part 2 sees", 4, 8, 0, np.s_[[0, 1, 3], 1, 0, 2]),
        ("one part", 1, 3, 0, np.s_[:0]),
        ("lse near 1000", 3, 1, 1000, np.s_[:, 0, 1, 1]),
        ("lse near -1000", 3, 5, -1000, np.s_[0, 0, 1, 1]),
        ("lse from -2000 to 2000 over the rows", 4, 5, spread, np.s_[:, 1, 1, 2]),
        ("lse from -2000 to 2000 over the parts", 5, 8, spread[:, None, None, None], np.s_[:0]),
    ):
        lses, outs = 2 * noise((n, 2, 2, 5)) + level, noise((n, 2, 2, 5, D_V))
        lses[dead], outs[dead] = -np.inf, 0
        given = lses.copy(), outs.copy()
        result = merge_all(outs, lses)
        assert result is not None, f"{what}: nothing is returned"
        got_out, got_lse = result
        same = np.array_equal(lses, given[0]) and np.array_equal(outs, given[1])
        assert same, f"{what}: the arguments were changed"
        want_out, want_lse = fold(lambda x, y: join(*x, *y), zip(outs, lses, strict=True))
        for name, got, want in (("lse", got_lse, want_lse), ("out", got_out, want_out)):
            shape = f"{what}: expected {name} of shape {want.shape}, got {np.shape(got)}"
            assert np.shape(got) == want.shape, shape
            off = ~np.isclose(got, want, atol=1e-11, rtol=1e-13)
            wrong = f"{what}: expected {name} {{:.4f}}, got {{:.4f}}"
            assert not off.any(), wrong.format(want[off][0], np.asarray(got)[off][0])


with (
    check("all parts at once, dead rows and all levels too", hide="merge reduce parts"),
    np.errstate(all="ignore"),
):
    parts_at_once()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def merge_all(outs, lses):
#     """Return (out, lse) over the keys of all n parts."""
#     largest = lses.max(axis=0)
#     base = np.where(largest == -np.inf, 0.0, largest)
#     weights = np.exp(lses - base)
#     total = weights.sum(axis=0)
#     seen = total > 0
#     some = np.where(seen, total, 1.0)
#     out = (weights[..., None] * outs).sum(axis=0) / some[..., None]
#     return out, np.where(seen, base + np.log(some), -np.inf)
# ```
#
# </details>

# %% [markdown]
# ## Summary
#
# <div class="alert alert-info">
#
# **Takeaways.** Three facts carry all that follows:
#
# - Attention over some keys gives `(out, lse)`, and two such results merge into the result over all
#   their keys. The weights follow from the difference of the two lse; the plain mean is wrong.
# - Parts can be merged in any order and grouping. Only the last bits differ.
# - `(0, -inf)` is the initial value of an accumulator and the result of a dead row. An initial lse
#   of 0 counts a phantom key, and masking with -1e9 lets dead rows attend to hidden keys.
#
# </div>
#
# Code: the merge is in [reference/merge.py](../reference/merge.py); tiles are merged in
# [reference/block_attention.py](../reference/block_attention.py); the ground truth, without any
# merge, is in [reference/full_attention.py](../reference/full_attention.py).
# [tests/test_known_defects.py](../tests/test_known_defects.py) tests every implementation for the
# defects above.
#
# Next: [notebook 2, why queries move](02_why_queries_move.ipynb). The appendix is optional.
#
# ## Appendix: orders, trees, and units of u
#
# **Predict.** How many orders and bracketings are there in which eight parts can be merged, two
# results at a time?
#
# <details><summary>Reasoning</summary>
#
# 8! = 40,320 orders, and for each $\binom{14}{7} / 8 = 429$ ways to place the brackets (a Catalan
# number): 17 million.
#
# </details>
#
# The next cells try 100 chains, with a random order each, and 100 trees, which repeatedly merge two
# results chosen at random.


# %%
def in_a_chain(parts, rng):
    """Merge the parts one after the other, in random order."""
    return reduce(lambda x, y: merge(*x, *y), [parts[n] for n in rng.permutation(len(parts))])


def in_a_tree(parts, rng):
    """Merge two randomly chosen results until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        x, y = (parts.pop(rng.integers(len(parts))) for _ in range(2))
        parts.append(merge(*x, *y))
    return parts[0]


# %% [markdown]
# Errors are in units of $u = 2^{-53} \approx 10^{-16}$, half the distance from 1 to the next fp64
# number, and relative to the largest `out`.

# %%
u = 2.0**-53
results = {f: [f(eight, rng)[0] for _ in range(100)] for f in (in_a_chain, in_a_tree)}
off = [[abs(x - out).max() / abs(out).max() / u for x in found] for found in results.values()]
ways = factorial(8) * comb(14, 7) // 8
assert ways == 17_297_280
print(f"{sum(map(len, off))} of {ways:,} ways tried")

# %% [markdown]
# The error has a bound. Each merge rounds lse, relative to its size, and takes a difference of it,
# twice; the remaining operations take 8 roundings. Scores and sums are rounded as well
# ([tests/tolerances.py](../tests/tolerances.py) derives each term).

# %%
seven_merges = 7 * (2 * abs(lse).max() + 8)
sums = 4 * (512**0.5 + 8)
rounded_scores = 2 * (16 + 2) * abs(scale * q @ k.swapaxes(2, 3)).max()
bound = (seven_merges + sums + rounded_scores) * abs(v).max() / abs(out).max()

# %% tags=["varies"]
worst, off_by_mean = max(map(max, off)), abs(mean - out).max() / abs(out).max() / u
print(f"200 ways: error at most {worst:.0f} u, bound {bound:.0f} u")
print(f"the mean of two halves: {off_by_mean:.0e} u")
assert worst < min(bound, 1e-13 / u)
assert off_by_mean > 1e12 * bound

# %% tags=["varies"]
merging.rounding_by_order(off)

# %% [markdown]
# All 200 ways are correct to at least 13 digits. They do not agree in every bit: rounding is not
# associative. Reproducible results require a fixed order; the ring of ranks in [notebook
# 3](03_the_ring_in_one_process.ipynb) has one.

# %%
different = {x.tobytes() for found in results.values() for x in found}
print("all to the same bits:", len(different) == 1)
assert len(different) > 1

# %% [markdown]
# <div class="alert alert-info">
#
# **Takeaway.** The order of merges changes the last bits and no more. A test compares with a bound
# derived from the arithmetic; a mean in place of a merge exceeds it by a factor of $10^{12}$.
#
# </div>
