r"""The operator on which everything rests: joining two attention results.

Attention over a set of keys gives `out`, the softmax-weighted mean of their values, and `lse`, the
natural log of the sum of their exponentiated scores.  Two results over disjoint keys join into the
result over the union of the keys:

    lse = logaddexp(lse_a, lse_b)
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

`merge` is associative and commutative, and (0, -inf), attention over no keys, is its identity.  It
joins the tiles of a block, the ranks of a ring and the members of a reduction.

Equation: arXiv:2502.02406, section 3; the running form is in arXiv:2307.08691, section 3.1.
"""

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
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
    lse = torch.logaddexp(lse_a, lse_b)
    # Where both are -inf, lse_a - lse would be NaN; against 0 both weights are 0, and so is out.
    base = torch.where(lse == -torch.inf, 0.0, lse)
    weight_a = torch.exp(lse_a - base)[..., None]
    weight_b = torch.exp(lse_b - base)[..., None]
    return torch.addcmul(weight_a * out_a, weight_b, out_b), lse
