r"""The operator on which everything rests: joining two attention results.

Attention over a set of keys gives `out`, the softmax-weighted mean of their values, and `lse`, the
natural log of the sum of their exponentiated scores.  Two results over disjoint keys join into the
result over the union of the keys:

    top = max(lse_a, lse_b)      a = exp(lse_a - top)      b = exp(lse_b - top)
    out = (a out_a + b out_b) / (a + b)
    lse = top + log(a + b)

The weights sum to 1 whatever lse is.  But where |lse| is so large that the log of a number of keys
is lost in its rounding, as in a row that a mask of -1e9 hides, lse cannot say how much each side
counts.  A partial result therefore holds lse as a pair, whose sum of exponentiated scores is
total exp(top), and is joined by the same equations:

    top = max(top_a, top_b)      a = total_a exp(top_a - top)      b = total_b exp(top_b - top)
    out = (a out_a + b out_b) / (a + b)
    total = a + b

(lse, 1) is such a pair.  Both forms are associative and commutative; attention over no keys,
(0, -inf) or (0, -inf, 0), is their identity.  They join the tiles of a block, the ranks of a ring
and the members of a reduction.

Equation: arXiv:2502.02406, section 3; the running form is in arXiv:2307.08691, section 3.1.
"""

from typing import Any

import numpy as np

from .transport.device import array_module

Array = Any  # NumPy or CuPy, in the accumulator dtype


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Join attention over one set of keys with attention over another, disjoint one.

    Parameters
    ----------
    out_a, out_b : (..., s_q, D_V)
        Weighted means of the values; 0 where lse is -inf.
    lse_a, lse_b : (..., s_q)
        Natural logs of the sums of exponentiated scores.

    Returns
    -------
    out : (..., s_q, D_V)
    lse : (..., s_q)
        The result over both sets of keys.  The arguments are left alone.
    """
    xp = array_module(out_a)
    out, top, total = merge_partials(
        out_a, lse_a, xp.ones_like(lse_a), out_b, lse_b, xp.ones_like(lse_b)
    )
    return out, lse_of(top, total)


def merge_partials(
    out_a: Array, top_a: Array, total_a: Array, out_b: Array, top_b: Array, total_b: Array
) -> tuple[Array, Array, Array]:
    """Join two partial results, with lse as a pair.

    Parameters
    ----------
    out_a, out_b : (..., s_q, D_V)
        Weighted means of the values; 0 where total is 0.
    top_a, top_b : (..., s_q)
        A bound that exponents are taken against, usually the largest score.
    total_a, total_b : (..., s_q)
        Sums of exponentiated scores, divided by exp(top).

    Returns
    -------
    out : (..., s_q, D_V)
    top, total : (..., s_q)
        The result over both sets of keys.  The arguments are left alone.
    """
    xp = array_module(out_a)
    top = xp.maximum(top_a, top_b)
    # Where both are -inf, top_a - top would be NaN; against 0 both weights are 0, and so is out.
    base = xp.where(top == -xp.inf, 0.0, top)
    with np.errstate(invalid="ignore"):  # NaN in, NaN out, and no warning
        weight_a, weight_b = total_a * xp.exp(top_a - base), total_b * xp.exp(top_b - base)
        total = weight_a + weight_b
        whole = xp.where(total == 0, 1.0, total)
        share_a, share_b = (weight_a / whole)[..., None], (weight_b / whole)[..., None]
    return share_a * out_a + share_b * out_b, top, total


def lse_of(top: Array, total: Array) -> Array:
    """Return lse, the log of total exp(top); -inf where total is 0."""
    xp = array_module(top)
    seen = total != 0
    return xp.where(seen, top + xp.log(xp.where(seen, total, 1.0)), -xp.inf)


def remainder_of(lse: Array, top: Array, total: Array) -> Array:
    """Return what lse has lost: the log of total exp(top), less lse; 0 where lse is -inf.

    A rounding where |lse| is small; where it is too large to hold it, the log of a number of keys.
    """
    xp = array_module(lse)
    seen = lse != -xp.inf
    top, lse = (xp.where(seen, x, 0.0) for x in (top, lse))  # -inf - -inf would be NaN
    return (top - lse) + xp.log(xp.where(seen, total, 1.0))
