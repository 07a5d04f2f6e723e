"""Where the passes meet autograd.

The passes themselves are plain functions on tensors.  What is saved between them is what the
equations need: q, k, v, out and lse; of these, only out and lse where a layer makes the others
again (`recompute.py`).  The layout is kept too, so that a backward sends nothing but blocks.

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
    """``(q, k, v) -> (out, lse)`` by a schedule's forward, and its backward.

    It saves q, k and v unless `made` is given: a node of the graph whose saved tensors they are.
    """

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
        made: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and save what the backward needs."""
        ctx.set_materialize_grads(False)
        with exactly(q.device):
            out, lse = forward(q, k, v, group, layout, mask=mask, meter=meter)
            # In memory (B, s_q, H, D_V): what joins the heads takes it as it is, and keeps no copy.
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        held = (q, k, v) if made is None else ()
        save(ctx, mask, *held, out, lse)
        ctx.made = made
        ctx.group, ctx.layout, ctx.backward, ctx.meter = group, layout, backward, meter
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate."""
        (*held, out, lse), mask = saved(ctx)
        q, k, v = held or ctx.made.saved_tensors
        with exactly(q.device):
            dout = torch.zeros_like(out) if dout is None else dout
            dq, dk, dv = ctx.backward(
                dout, q, k, v, out, lse, ctx.group, ctx.layout,
                mask=mask, dlse=dlse, meter=ctx.meter,
            )  # fmt: skip
        return dq, dk, dv, *[None] * 7


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
