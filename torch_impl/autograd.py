"""Where the passes meet autograd: one function for attention, one for a layer that recomputes.

The passes themselves are plain functions on tensors.  What is saved between them is what the
equations need: q, k, v, out and lse for attention; x, y, out and lse for a layer (`recompute.py`);
and of lse what it has lost in rounding.  The layout is kept too, so that a backward sends nothing
but blocks.

A backward is collective like its forward: the loss of every rank has to depend on its out, be it
times 0, and all ranks call their losses' backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import delta_of
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.merge import lse_of, remainder_of

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Attention(torch.autograd.Function):
    """``(q, k, v) -> (out, lse)`` by a schedule's forward, and its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | MaskRule | None,
        group: Group,
        layout: Layout,
        forward: Forward,
        backward: Backward,
        meter: Meter | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and save what the backward needs."""
        ctx.set_materialize_grads(False)
        with exactly(q.device):
            out, lse, low = attend(forward, q, k, v, group, layout, mask=mask, meter=meter)
        save(ctx, mask, q, k, v, out, lse, low)
        ctx.group, ctx.layout, ctx.backward, ctx.meter = group, layout, backward, meter
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate."""
        (q, k, v, out, lse, low), mask = saved(ctx)
        with exactly(q.device):
            dout = torch.zeros_like(out) if dout is None else dout
            dq, dk, dv = differentiate(
                ctx.backward, dout, q, k, v, out, lse, low, dlse, ctx.group, ctx.layout,
                mask=mask, meter=ctx.meter,
            )  # fmt: skip
        return dq, dk, dv, *[None] * 6


def attend(
    forward: Forward, q: Tensor, k: Tensor, v: Tensor, group: Group, layout: Layout, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out in q's dtype, lse, and what lse has lost, of a schedule's forward."""
    out, top, total = forward(q, k, v, group, layout, **options)
    lse = lse_of(top, total)
    return out.to(q.dtype), lse, remainder_of(lse, top, total)


def differentiate(
    backward: Backward,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    dlse: Tensor | None,
    group: Group,
    layout: Layout,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv in their arguments' dtypes, of a schedule's backward."""
    # dout in q's dtype, as it is on the ranks that it visits.
    dout, delta = delta_of(dout.to(q.dtype), out, lse, low, dlse)
    dq, dk, dv = backward(dout, q, k, v, lse, delta, group, layout, **options)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def save(ctx: Any, mask: Tensor | MaskRule | None, *tensors: Tensor) -> None:
    """Save tensors, and a mask of any kind, for the backward."""
    held = [mask] if isinstance(mask, Tensor) else []
    ctx.save_for_backward(*tensors, *held)
    ctx.rule = None if held else mask
    ctx.count = len(tensors)


def saved(ctx: Any) -> tuple[list[Tensor], Tensor | MaskRule | None]:
    """Return what `save` was given."""
    tensors = list(ctx.saved_tensors)
    held = tensors[ctx.count :]
    return tensors[: ctx.count], held[0] if held else ctx.rule


def exactly(device: torch.device) -> torch.autocast:
    """Compute in the dtypes that are given: autocast has had its say before."""
    return torch.autocast(device.type, enabled=False)
