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

import torch
from torch import Tensor

Array = Tensor  # as the other implementations call it


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over one set of keys with attention over another, disjoint one.

    Differentiable.

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
    out, top, total = merge_partials(
        out_a, lse_a, torch.ones_like(lse_a), out_b, lse_b, torch.ones_like(lse_b)
    )
    return out, lse_of(top, total)


def merge_partials(
    out_a: Tensor, top_a: Tensor, total_a: Tensor, out_b: Tensor, top_b: Tensor, total_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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
    top = torch.maximum(top_a, top_b).detach()  # any bound gives the same result
    # Where both are -inf, top_a - top would be NaN; against 0 both weights are 0, and so is out.
    base = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = total_a * torch.exp(top_a - base), total_b * torch.exp(top_b - base)
    total = weight_a + weight_b
    whole = torch.where(total == 0, 1.0, total)
    share_a, share_b = (weight_a / whole)[..., None], (weight_b / whole)[..., None]
    return torch.addcmul(share_a * out_a, share_b, out_b), top, total


def lse_of(top: Tensor, total: Tensor) -> Tensor:
    """Return lse, the log of total exp(top); -inf where total is 0."""
    seen = total != 0
    return torch.where(seen, top + torch.log(torch.where(seen, total, 1.0)), -torch.inf)


def remainder_of(lse: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Return what lse has lost: the log of total exp(top), less lse; 0 where lse is -inf.

    A rounding where |lse| is small; where it is too large to hold it, the log of a number of keys.
    """
    seen = lse != -torch.inf
    top, lse = (torch.where(seen, x, 0.0) for x in (top, lse))  # -inf - -inf would be NaN
    return (top - lse) + torch.log(torch.where(seen, total, 1.0))
