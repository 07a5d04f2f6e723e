r"""Prepare masks, heads and `out` for PyTorch's fused kernels.

A bias.  Fused kernels take an additive bias in q's dtype.  For a row that is -inf throughout they
return different things (lse 0, +inf or NaN), so they never get one: its bias is 0, and its results
are replaced afterwards.  In the backward an lse of +inf makes all probabilities of a row, and with
them all gradients through it, exactly 0.

Plain heads.  The query heads of a group are stacked as rows of one head:

    q (B, H, s_q, D) -> (B, H_KV, G s_q, D), the same bytes        G = H / H_KV

Without a mask rows are independent, so that only the work changes: keys are read once per group,
tiles of rows are full where s_q is short, and the sums over the heads of a group are the kernel's
own sums over rows.  Given grouped heads, PyTorch's flash (mha_bwd in flash_api.cpp) and cuDNN first
compute dk and dv of every query head, with G times the memory of k and v, and add them in 16 bits.

A surrogate `out`.  Fused backwards take dout, out and lse, and first compute delta = rowsum(dout *
out).  Here delta is given (-dlse included), and out over all keys has not been sent.  They get an
out* whose row sums are delta; the shortest is

    out* = dout delta / |dout|^2

It is also the one that rounding to 16 bits changes least: the error of a sum of products dout_i
out_i is proportional to |out| for a given |dout|.

Where dout is 0, or so small that out* would overflow, and delta is not (the loss uses lse), there
is no out*, and dout is replaced in that row.  With e the first unit vector,

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

NaN compares false, and so stays in its row.  There is no branch on data, so that the host never
waits.  fp16, whose whole range is 2^-24 to 2^16, has no room for these numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView

ROOM = 2.0**-100


@dataclass(frozen=True)
class Bias:
    """The mask of a block, as a kernel takes it.

    Attributes
    ----------
    bias : (B or 1, H or 1, s_q or 1, s_kv), q's dtype, or None
        Added to the scores.
    dead : (B or 1, H or 1, s_q or 1) of bool, or None
        Rows that see no key of the block.
    """

    bias: Tensor | None
    dead: Tensor | None

    @staticmethod
    def of(mask: MaskView, q: Tensor, k: Tensor) -> "Bias":
        """Return the bias of an array mask over this block."""
        B, H, s_q, _ = q.shape
        tile = mask.tile(slice(0, B), slice(0, H), slice(0, s_q), slice(0, k.shape[2]), _no_arange)
        if tile is None:
            return Bias(None, None)
        if tile.dtype == torch.bool:
            dead = ~tile.any(dim=-1)
            visible = tile | dead[..., None]
            bias = torch.zeros((), dtype=q.dtype, device=q.device).where(visible, -torch.inf)
        else:
            bias = tile.to(q.dtype)
            dead = (bias == -torch.inf).all(dim=-1)
            bias = bias.masked_fill(dead[..., None], 0.0)
        return Bias(bias, dead)

    def settle(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the partial result from a kernel's out and lse; (0, -inf) in dead rows."""
        if self.dead is not None:
            out = out.masked_fill(self.dead[..., None], 0.0)
            lse = lse.masked_fill(self.dead, -torch.inf)
        return out, lse, torch.ones_like(lse)

    def closed(self, lse: Tensor) -> Tensor:
        """Return lse for a backward kernel: +inf in rows that see no key here or at all."""
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return lse if self.dead is None else lse.masked_fill(self.dead, torch.inf)


def fold(x: Tensor, k: Tensor) -> Tensor:
    """Stack the rows of the query heads of x (B, H, s_q, ...) that share a key-value head of k."""
    return x.reshape(x.shape[0], k.shape[1], -1, *x.shape[3:])  # (B, H_KV, G s_q, ...)


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
    # The threshold in dtype, so that the divisor is what the kernel multiplies by.
    least = (delta.abs() * ROOM).clamp(min=torch.finfo(dtype).tiny).to(dtype)[..., None]
    dout = dout.to(dtype)
    replaced = (dout.abs().amax(dim=-1, keepdim=True) < least) & (delta != 0)[..., None]
    unit = torch.zeros(dout.shape[-1], dtype=dtype, device=dout.device)
    unit[:1].fill_(1.0)
    dout = torch.where(replaced, least * unit, dout)
    wide = dout.to(delta.dtype)
    # These bounds matter only where dout and delta are 0.
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    direction = wide / largest
    length = direction.square().sum(dim=-1, keepdim=True).clamp(min=1.0)
    out = direction * (delta[..., None] / largest / length)
    return dout, out.to(dtype)


def _no_arange(start: int, stop: int) -> Tensor:
    raise AssertionError(f"expected an array mask, got a callable for keys {start} to {stop}")
