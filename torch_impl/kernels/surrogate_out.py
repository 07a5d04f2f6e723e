r"""A stand-in for `out`, for backward kernels that want it and use it for delta alone.

Fused backwards take dout, out and lse, and begin with delta = rowsum(dout * out).  Here delta is
given (it holds -dlse too), and out over all keys has not travelled.  They get any out* for which
the row sums are delta; the shortest is

    out* = dout delta / |dout|^2

It is also the one that rounding to 16 bits moves least: the error of a sum of products dout_i out_i
is proportional to |out| at equal |dout|.

Where dout is 0, or so small that out* would overflow, and delta is not (the loss uses lse), no out*
will do, and dout is replaced in that row.  With e the first unit vector,

    dout' = t e       out* = (delta / t) e        t = max(|delta| 2^-100, tiny)

is used in rows where max|dout| < t and delta is not 0; tiny is the smallest normal number of the
dtype.  Where both are 0, so is out*, and gradients are exactly 0.

- It is representable: delta / t is at most 2^100; t <= |delta| 2^-100 or tiny.  In the other rows
  out* is at most |delta| / max|dout| <= 2^100.
- It changes nothing: no component of dout moves by more than 2 t, so dp - delta by 2^-99 |delta|
  times the sum of v's D_V magnitudes, against the 2^-24 |delta| (fp32) or 2^-53 |delta| (fp64) by
  which the subtraction is rounded anyway, for any such sum below 2^46; dv moves by 2^-99 |delta| p.
  Where t is tiny both are at the underflow limit.
- |dout|^2 neither overflows nor vanishes: with d = dout / max|dout| it is max|dout|^2 |d|^2, |d|^2
  from 1 to D_V.

NaN compares false and so keeps its row.  There is no branch on data, and nothing for a host to wait
for.  fp16, whose whole range is 2^-24 to 2^16, has no room for any of this.
"""

import torch
from torch import Tensor

ROOM = 2.0**-100


def surrogate_out(dout: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return dout', and out* such that rowsum(dout' * out*) is delta.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
    delta : (B, H, s_q), accumulator dtype
    dtype : torch.dtype
        Of the kernel: bf16, fp32 or fp64, none wider than the accumulator.

    Returns
    -------
    dout, out : (B, H, s_q, D_V), dtype
    """
    # The threshold in dtype, so that what is divided by is what the kernel multiplies by.
    least = (delta.abs() * ROOM).clamp(min=torch.finfo(dtype).tiny).to(dtype)[..., None]
    dout = dout.to(dtype)
    replaced = (dout.abs().amax(dim=-1, keepdim=True) < least) & (delta != 0)[..., None]
    unit = torch.zeros(dout.shape[-1], dtype=dtype, device=dout.device)
    unit[:1].fill_(1.0)
    dout = torch.where(replaced, least * unit, dout)
    wide = dout.to(delta.dtype)
    # Bounds that matter only where dout and delta are 0.
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    direction = wide / largest
    length = direction.square().sum(dim=-1, keepdim=True).clamp(min=1.0)
    out = direction * (delta[..., None] / largest / length)
    return dout, out.to(dtype)
