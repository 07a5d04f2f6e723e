"""What fused kernels are given in place of a mask, and which rows it leaves nothing to see.

They want an additive bias in q's dtype.  What they do with a row that is -inf throughout is
different in each of them (lse 0, +inf or NaN), so they never see one: its bias is 0, and what comes
out of it is put right afterwards.  In the backward an lse of +inf makes a row's probabilities, and
with them all gradients through it, exactly 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView


@dataclass(frozen=True)
class Bias:
    """A block's mask as a kernel takes it.

    Attributes
    ----------
    bias : (B or 1, H or 1, s_q or 1, s_kv), q's dtype, or None
        Added to the scores.
    dead : (B or 1, H or 1, s_q or 1) of bool, or None
        Rows that see none of these keys.
    """

    bias: Tensor | None
    dead: Tensor | None

    @staticmethod
    def of(mask: MaskView, q: Tensor, k: Tensor) -> "Bias":
        """Cut the block's part out of an array mask."""
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
        """Return the partial result that a kernel's out and lse are; (0, -inf) in dead rows."""
        if self.dead is not None:
            out = out.masked_fill(self.dead[..., None], 0.0)
            lse = lse.masked_fill(self.dead, -torch.inf)
        return out, lse, torch.ones_like(lse)

    def closed(self, lse: Tensor) -> Tensor:
        """Return lse for a backward kernel: +inf in rows that see nothing, here or anywhere."""
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return lse if self.dead is None else lse.masked_fill(self.dead, torch.inf)


def _no_arange(start: int, stop: int) -> Tensor:
    raise AssertionError(f"a callable mask is not asked for keys {start} to {stop} at once")
