# %% [markdown]
# # 1. Merging softmax: attention in pieces
#
# You will learn how to split the keys of softmax attention into pieces, attend to each piece
# separately, and merge the results exactly; and to recognise four ways in which that goes wrong.
#
# Prerequisites: softmax attention and NumPy. Time: about 30 minutes.
#
# In all eight notebooks, **Predict.** marks a question. Decide on an answer before you open its
# *Reasoning* and run the next cell: wrong guesses are remembered best.

# %%
from functools import reduce
from itertools import pairwise
from math import comb, factorial
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
from exercise import check

from lvxattn.draw.rotation import COLOURS, INK
from lvxattn.reference import block_attention, full_attention, merge

BLUE, ORANGE, RED = COLOURS[0], COLOURS[1], COLOURS[5]
plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11,
    "axes.spines.top": False, "axes.spines.right": False,
})  # fmt: skip

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
# **Predict.** What are the shapes of `out` and `lse` below?
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

# %% tags=["hide-input", "varies"]
figure, axes = plt.subplots(figsize=(8, 3.6))
broken = np.isnan(plain)
axes.semilogy(levels, plain, color=ORANGE, lw=2.5)
axes.semilogy(levels, safe, color=BLUE, lw=2.5)
for lost in (levels[broken & (levels < 0)], levels[broken & (levels > 0)]):
    axes.axvspan(lost[0], lost[-1], color=ORANGE, alpha=0.18, lw=0)
    axes.text(lost.mean(), 3e-2, "NaN", color=RED, size=13, ha="center", weight="bold")
axes.text(-93, 2e-3, "exp(s), then divide:\nunderflow", color="#A66F00", size=12)
axes.text(78, 2e-3, "exp(s), then divide:\noverflow", color="#A66F00", size=12, ha="right")
axes.text(0, 1.5e-6, "exp(s - max s), then divide", color=BLUE, ha="center", size=12)
axes.set(xlim=(-130, 130), ylim=(3e-8, 1), xlabel="constant added to all scores",
         ylabel="largest error of out in fp32")  # fmt: skip
plt.show()

# %% [markdown]
# Without subtracting the maximum, softmax works only in a window of scores. (It ends below 88
# because the largest score of this query is above 0.) With it, every level works; only the rounding
# error grows, because fp32 rounds larger scores more coarsely.
#
# ### Exercise 1: lse at every level
#
# Write `stable_lse(s)`: the log-sum-exp along the last axis, in the dtype of `s`, for scores at any
# level.


# %% tags=["exercise"]
def stable_lse(s):
    """Return log(sum(exp(s))) along the last axis."""
    return np.log(np.exp(s).sum(axis=-1))


# %% tags=["check"]
with check("lse is correct at every level"), np.errstate(all="ignore"):
    rows = {level: scores + level for level in (0, 100, 1000, -200)}
    found = stable_lse(np.stack(list(rows.values())).astype(np.float32))
    assert found.shape == (4,), f"4 rows of scores: expected shape (4,), got {found.shape}"
    assert found.dtype == np.float32, f"expected float32, got {found.dtype}"
    for level, got in zip(rows, found, strict=True):
        expected = lse[0, 0, 0] + level
        wrong = f"scores near {level}: expected {expected:.3f}, got {got:.3f}"
        assert abs(got - expected) < 1e-3, wrong

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

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 3.6))
line = np.linspace(-2.4, 2.4, 200)
axes.plot(line, 1 / (1 + np.exp(-line)), color=BLUE, lw=2)
axes.plot(difference.ravel(), weight.ravel(), "o", color=INK, ms=4.5)
axes.axhline(0.5, color=ORANGE, lw=2)
axes.text(-2.3, 0.53, "mean: weight 1/2", color="#A66F00", size=12)
axes.text(1.3, 0.9, r"$1 / (1 + e^{-(\mathrm{lse}_a - \mathrm{lse}_b)})$", color=BLUE,
          size=13, ha="right")  # fmt: skip
axes.text(1.2, 0.66, "dots: the 64 queries,\nfrom full_attention", color=INK, size=11, va="center")
axes.set(xlim=(-2.4, 2.4), ylim=(0, 1), xlabel=r"$\mathrm{lse}_a - \mathrm{lse}_b$",
         ylabel="weight of part a")  # fmt: skip
plt.show()

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
# `np.logaddexp` computes the first without overflow: it, too, subtracts the larger argument. From
# here on errors are in units of $u = 2^{-53} \approx 10^{-16}$, half the distance from 1 to the
# next fp64 number.
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
u = 2.0**-53
merged, merged_lse = merge(out_a, lse_a, out_b, lse_b)
high, _ = merge(out_a, lse_a + 1000, out_b, lse_b + 1000)
error, error_high = abs(merged - out).max(), abs(high - out).max()
print(f"error {error / u:.0f} u, at 1,000 it is {error_high / u:.0f} u")
assert max(error, abs(merged_lse - lse).max()) < 1e-14
assert error_high < 1e-12

# %% [markdown]
# The parts may be two tiles, two kernel launches, or two machines. The merge needs neither scores
# nor keys: `out` and `lse` are enough.
#
# ## Any order, any tree
#
# Numerators add, and addition is associative and commutative; so is `merge`. Eight parts of any
# length, one of them empty, can be merged in any order and any grouping.
#
# **Predict.** In how many ways?
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


# %%
cuts = [0, 5, 100, 101, 230, 230, 300, 450, 512]
eight = [
    block_attention(q, k[:, :, start:stop], v[:, :, start:stop], scale=scale)
    for start, stop in pairwise(cuts)
]
results = {f: [f(eight, rng)[0] for _ in range(100)] for f in (in_a_chain, in_a_tree)}
off = {f: [abs(x - out).max() / abs(out).max() for x in found] for f, found in results.items()}
assert factorial(8) * comb(14, 7) // 8 == 17_297_280  # 200 of them are tried here

# %% [markdown]
# The error has a bound. Each merge rounds lse, relative to its size, and takes a difference of it,
# twice; the remaining operations take 8 roundings. Scores and sums are rounded as well
# ([tests/tolerances.py](../tests/tolerances.py) derives each term).

# %%
seven_merges = 7 * (2 * abs(lse).max() + 8) * u
sums = 4 * (512**0.5 + 8) * u
rounded_scores = 2 * (16 + 2) * abs(scale * q @ k.swapaxes(2, 3)).max() * u
limit = (seven_merges + sums + rounded_scores) * abs(v).max() / abs(out).max()

# %% tags=["varies"]
worst = max(map(max, off.values()))
off_by_mean = abs(mean - out).max() / abs(out).max()
print(f"200 ways: error at most {worst / u:.0f} u, bound {limit / u:.0f} u")
print(f"the mean of two halves: {off_by_mean / u:.0e} u")
assert worst < min(limit, 1e-13)
assert off_by_mean > 1e12 * limit

# %% tags=["hide-input", "varies"]
figure, axes = plt.subplots(figsize=(8, 3.4))
bins = np.arange(0, np.ceil(worst / u) + 3, 2)
units = [np.array(errors) / u for errors in off.values()]
axes.hist(units, bins, color=(BLUE, ORANGE), label=("100 chains", "100 trees"))
axes.legend(frameon=False, loc="upper right")
axes.set(xlabel=r"largest error of out, in units of $u = 2^{-53}$, relative to the largest out",
         ylabel="number of orders", xlim=(0, bins[-1]))  # fmt: skip
plt.show()

# %% [markdown]
# All 200 ways are correct to at least 13 digits. They do not agree in every bit: rounding is not
# associative. Reproducible results require a fixed order; the ring of ranks in [notebook
# 3](03_the_ring_in_one_process.ipynb) has one.

# %%
different = {x.tobytes() for found in results.values() for x in found}
print("all to the same bits:", len(different) == 1)
assert len(different) > 1

# %% [markdown]
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
print("merging with (0, -inf) changes no bit")

# %% [markdown]
# Buffers are often allocated as zeros, and a published implementation starts its lse at 0. But $e^0
# = 1$: such an accumulator counts a phantom key with score 0 and value 0.
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

# %%
passes = np.array([np.allclose(x, out, atol=1e-2) for x in found])
usual = np.log(4096) + 0.5  # 4,096 keys with scores of variance 1: log n plus half the variance
assert passes[true_lse > usual].all()
assert not passes[true_lse <= 4].any()

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(8, 3.8))
axes.axvspan(true_lse[passes][0] - 0.25, 12, color=ORANGE, alpha=0.18, lw=0)
axes.semilogy(true_lse, 1 / (1 + np.exp(true_lse)), color=BLUE, lw=2)
axes.semilogy(true_lse, relative, "o", color=INK, ms=4.5)
axes.axvline(usual, color=INK, lw=1, ls=(0, (4, 3)))
axes.text(usual + 0.1, 2e-2, "lse of 4,096 keys,\nrandom scores", color=INK, size=11)
axes.text(6.75, 0.2, "allclose(atol=1e-2)\npasses", color="#A66F00", size=12, ha="center")
axes.text(-3.8, 0.2, r"$1 / (1 + e^{\mathrm{lse}})$", color=BLUE, size=13)
axes.set(xlabel="true lse", ylabel="relative error of out", xlim=(-4, 12))
plt.show()

# %% [markdown]
# The error is large if scores are low or keys are few. The usual first test, with many random keys
# and a generous tolerance, does not detect it.
#
# ### Exercise 2: tile by tile
#
# Write `in_tiles(q, k, v, tile)`: attention over all keys, with `block_attention` on at most `tile`
# keys at a time, joined by `merge`. The last tile may be shorter, and there may be no keys at all.
# Use the `scale` from above.


# %% tags=["exercise"]
def in_tiles(q, k, v, tile):
    """Return (out, lse), `tile` keys at a time."""
    raise NotImplementedError("in_tiles is not implemented")


# %% tags=["check"]
with check("tiles are merged from the correct start to the last key"):
    for S_KV, tile in ((512, 64), (10, 4), (3, 8), (0, 8)):
        few = k[:, :, :S_KV], v[:, :, :S_KV]
        want_out, want_lse = full_attention(q, *few, scale=scale)
        with patch("__main__.block_attention", wraps=block_attention) as calls:
            got_out, got_lse = in_tiles(q, *few, tile)
        where = f"{S_KV} keys in tiles of {tile}"
        seen = [[*c.args, *c.kwargs.values()][1].shape[2] for c in calls.call_args_list]
        assert max(seen, default=0) <= tile, f"{where}: one block has {max(seen)} keys"
        assert sum(seen) == S_KV, f"{where}: the blocks have {sum(seen)} keys together"
        assert got_out is not None, f"{where}: expected out 0 and lse -inf, got None"
        wrong = f"{where}: expected lse {want_lse[0, 0, 0]:.4f}, got {got_lse[0, 0, 0]:.4f}"
        assert np.allclose(got_lse, want_lse, atol=1e-12, rtol=0), wrong
        wrong = f"{where}: expected out {want_out[0, 0, 0, 0]:.4f}, got {got_out[0, 0, 0, 0]:.4f}"
        assert np.allclose(got_out, want_out, atol=1e-12, rtol=0), wrong

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# ```python
# def in_tiles(q, k, v, tile):
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

# %%
want_out, want_lse = full_attention(few_q, few_k, few_v, scale=scale, mask=visible)
assert lse_seen[0, 0, 0] == -np.inf
assert not out_seen[0, 0, 0].any()
assert np.isfinite(lse_seen[0, 0, 1:]).all()
assert np.allclose(out_seen, want_out, atol=1e-14, rtol=0)
assert np.allclose(lse_seen, want_lse, atol=1e-14, rtol=0)

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=(16, 7), sharey=True)
left.pcolormesh(visible[0, 0], cmap="Blues", vmin=0, vmax=2, edgecolor="white", lw=1)
for start in (4, 8, 12):
    left.axvline(start, color=INK, lw=2)
table = np.stack([part_lse[0, 0] for _, part_lse in [*parts, (out_seen, lse_seen)]], axis=1)
right.set_facecolor("#E4E4E4")
right.pcolormesh(np.where(np.isinf(table), np.nan, table), cmap="Blues", vmin=-3, vmax=8,
                 edgecolor="white", lw=1)  # fmt: skip
for (row, column), value in np.ndenumerate(table):
    text = "-inf" if np.isinf(value) else f"{value:.1f}"
    right.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=9.5, color=INK)
right.axvline(4, color=INK, lw=2)
left.set(title="mask: frames that a token may see", xlabel="frame", ylabel="token", ylim=(8, 0),
         yticks=np.arange(8) + 0.5, yticklabels=range(8), xticks=np.arange(0, 16, 4) + 0.5,
         xticklabels=range(0, 16, 4))  # fmt: skip
right.set(title="lse", xticks=np.arange(5) + 0.5,
          xticklabels=["part 0", "1", "2", "3", "merged"])  # fmt: skip
plt.show()

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
# A reduction over machines may have all parts at the same time. Write `merge_all(outs, lses)`
# without a loop: `outs` is (n, B, H, s_q, D_V) and `lses` (n, B, H, s_q); return the merge of all n
# parts. Dead rows give `(0, -inf)`.


# %% tags=["exercise"]
def merge_all(outs, lses):
    """Return (out, lse) over the keys of all n parts."""
    return outs.mean(axis=0), np.log(np.exp(lses).sum(axis=0))


# %% tags=["check"]
with check("all parts at once, also for dead rows and high scores"), np.errstate(all="ignore"):
    for level in (0, 1000):
        outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
        got_out, got_lse = merge_all(outs, lses + level)
        wrong = (
            f"dead row: expected out 0 and lse -inf, got {got_out[0, 0, 0, 0]}, {got_lse[0, 0, 0]}"
        )
        assert got_lse[0, 0, 0] == -np.inf, wrong
        assert not got_out[0, 0, 0].any(), wrong
        wrong = f"lse near {level}, token 7: expected lse {want_lse[0, 0, 7] + level:.4f}"
        assert np.allclose(got_lse, want_lse + level, atol=1e-12), (
            f"{wrong}, got {got_lse[0, 0, 7]:.4f}"
        )
        wrong = f"lse near {level}, token 7: expected out {want_out[0, 0, 7, 0]:.4f}"
        assert np.allclose(got_out, want_out, atol=1e-12), f"{wrong}, got {got_out[0, 0, 7, 0]:.4f}"

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
# - Attention over some keys gives `(out, lse)`, and two such results merge into the result over all
#   their keys. The weights follow from the difference of the two lse; the plain mean is wrong.
# - Parts can be merged in any order and grouping. Only the last bits differ.
# - `(0, -inf)` is the initial value of an accumulator and the result of a dead row. An initial lse
#   of 0 counts a phantom key, and masking with -1e9 lets dead rows attend to hidden keys.
#
# Code: the merge is in [reference/merge.py](../reference/merge.py); tiles are merged in
# [reference/block_attention.py](../reference/block_attention.py); the ground truth, without any
# merge, is in [reference/full_attention.py](../reference/full_attention.py).
# [tests/test_known_defects.py](../tests/test_known_defects.py) tests every implementation for the
# defects above.
#
# Next: [notebook 2, why queries move](02_why_queries_move.ipynb).
