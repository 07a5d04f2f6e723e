r"""The merge: join two attention results over disjoint sets of keys.

Attention over a set of keys is a partial result of three arrays: `out`, the softmax-weighted mean
of the values, and the sum of exponentiated scores, written as total exp(top), where `top` is the
largest score or, of a result that is given by lse, lse.  Two partial results over disjoint keys
join into that over their union:

    top = max(top_a, top_b)      a = total_a exp(top_a - top)      b = total_b exp(top_b - top)
    out = (a out_a + b out_b) / (a + b)
    total = a + b

With lse = top + log(total), the pair (lse, 1) stands for the same sum, and (out, lse) join by

    top = max(lse_a, lse_b)      a = exp(lse_a - top)      b = exp(lse_b - top)
    out = (a out_a + b out_b) / (a + b)
    lse = top + log(a + b)

Schedules merge the three arrays.  In a row that a mask of -1e9 hides, lse is about -1e9; rounded to
float32 it has lost the log of the number of keys, and no longer holds the weights of both sides.

Both forms are associative and commutative; attention over no keys, (0, -inf, 0) or (0, -inf), is
their identity.  The merge joins the tiles of a block, the ranks of a ring and the members of a
reduction.

Equation: arXiv:2502.02406, section 3; the running form is in arXiv:2307.08691, section 3.1.
"""

import torch
from torch import Tensor

Array = Tensor  # as the other implementations call it


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attention results over disjoint sets of keys.

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
        The result over both sets of keys, both in the dtype of lse.  The arguments are not changed.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import block_attention, merge
    >>> q = k = v = torch.randn(1, 1, 6, 4)
    >>> first = block_attention(q, k[:, :, :2], v[:, :, :2], scale=0.5)
    >>> rest = block_attention(q, k[:, :, 2:], v[:, :, 2:], scale=0.5)
    >>> together = block_attention(q, k, v, scale=0.5)
    >>> all(torch.allclose(x, y, atol=1e-6) for x, y in zip(merge(*first, *rest), together))
    True
    """
    out, top, total = merge_partials(
        out_a, lse_a, torch.ones_like(lse_a), out_b, lse_b, torch.ones_like(lse_b)
    )
    return out, lse_of(top, total)


def merge_partials(
    out_a: Tensor, top_a: Tensor, total_a: Tensor, out_b: Tensor, top_b: Tensor, total_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join two partial results over disjoint sets of keys.

    Parameters
    ----------
    out_a, out_b : (..., s_q, D_V)
        Weighted means of the values; 0 where total is 0.
    top_a, top_b : (..., s_q)
        What exponents are taken against: the largest score, or lse.
    total_a, total_b : (..., s_q)
        Sums of exponentiated scores, divided by exp(top).

    Returns
    -------
    out : (..., s_q, D_V)
    top, total : (..., s_q)
        The result over both sets of keys.  The arguments are not changed.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import block_attention, merge
    >>> q = k = v = torch.randn(1, 1, 6, 4)
    >>> first = block_attention(q, k[:, :, :2], v[:, :, :2], scale=0.5)
    >>> rest = block_attention(q, k[:, :, 2:], v[:, :, 2:], scale=0.5)
    >>> together = block_attention(q, k, v, scale=0.5)
    >>> all(torch.allclose(x, y, atol=1e-6) for x, y in zip(merge(*first, *rest), together))
    True
    """
    top = torch.maximum(top_a, top_b).detach()  # any bound gives the same result
    # Where both are -inf, top_a - top would be NaN; against 0 both weights are 0, and so is out.
    base = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = total_a * torch.exp(top_a - base), total_b * torch.exp(top_b - base)
    total = weight_a + weight_b
    safe_total = torch.where(total == 0, 1.0, total)
    share_a, share_b = (weight_a / safe_total)[..., None], (weight_b / safe_total)[..., None]
    return torch.addcmul(share_a * out_a, share_b, out_b), top, total


def lse_of(top: Tensor, total: Tensor) -> Tensor:
    """Return lse, the log of total exp(top); -inf where total is 0."""
    seen = total != 0
    return torch.where(seen, top + torch.log(torch.where(seen, total, 1.0)), -torch.inf)


def lse_remainder_of(lse: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Return the rounding error of lse: the log of total exp(top), less lse; 0 where lse is -inf.

    In float32 with |lse| near 1e9 it is as large as the log of the number of keys.
    """
    seen = lse != -torch.inf
    top, lse = (torch.where(seen, x, 0.0) for x in (top, lse))  # -inf - -inf would be NaN
    return (top - lse) + torch.log(torch.where(seen, total, 1.0))
