"""Where the passes meet autograd: one function for attention, one for a layer that recomputes.

The passes themselves are plain functions on tensors.  What is saved between them is what the
equations need: q, k, v, out and lse for attention; x, y, out and lse for a layer (`recompute.py`).
The layout is kept too, so that a backward sends nothing but blocks.

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
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout

Forward = Callable[..., tuple[Tensor, Tensor]]
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
            out, lse = forward(q, k, v, group, layout, mask=mask, meter=meter)
        save(ctx, mask, q, k, v, out, lse)
        ctx.group, ctx.layout = group, layout.numbered()
        ctx.backward, ctx.meter = backward, meter
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate."""
        (q, k, v, out, lse), mask = saved(ctx)
        with exactly(q.device):
            dout = torch.zeros_like(out) if dout is None else dout
            dq, dk, dv = ctx.backward(
                dout, q, k, v, out, lse, ctx.group, ctx.layout,
                mask=mask, dlse=dlse, meter=ctx.meter,
            )  # fmt: skip
        return dq, dk, dv, *[None] * 6


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
