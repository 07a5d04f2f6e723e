"""Where the passes meet autograd.

The passes themselves are plain functions on tensors.  What is saved between them is what the
equations need: q, k, v, out and lse, and of lse what it has lost in rounding; of q, k and v nothing
where a layer makes them again (`recompute.py`).  The layout is kept too, so that a backward sends
nothing but blocks.

A backward is collective like its forward: the loss of every rank has to depend on its out, be it
times 0, and all ranks call their losses' backward.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import delta_of
from lvxattn.torch_impl.exchange import Exchange
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.merge import lse_of, remainder_of

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
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
            if q.is_meta and layout.size > 1:
                out, top, total = shapes(q, v, layout)
            else:
                exchange = Exchange(group, layout, q, mask, meter)
                out, top, total = forward(q, k, v, exchange)
                exchange.finish()
            lse = lse_of(top, total)
            low = remainder_of(lse, top, total)
            # In memory (B, s_q, H, D_V): what joins the heads takes it as it is, and keeps no copy.
            out = out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        held = (q, k, v) if made is None else ()
        save(ctx, mask, *held, out, lse, low)
        ctx.made = made
        ctx.group, ctx.layout = group, layout.numbered()
        ctx.backward, ctx.meter = backward, meter
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate."""
        (*held, out, lse, low), mask = saved(ctx)
        q, k, v = held or ctx.made.saved_tensors
        if q.is_meta and ctx.layout.size > 1:
            return *map(torch.empty_like, (q, k, v)), *[None] * 7
        with exactly(q.device):
            # dout in q's dtype, as it is on the ranks that it visits.
            dout = torch.zeros_like(out) if dout is None else dout.to(q.dtype)
            dout, delta = delta_of(dout, out, lse, low, dlse)
            exchange = Exchange(ctx.group, ctx.layout, q, mask, ctx.meter)
            dq, dk, dv = ctx.backward(dout, q, k, v, lse, delta, exchange)
            exchange.finish()
            dq, dk, dv = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
        return dq, dk, dv, *[None] * 7


def shapes(q: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a forward over ranks returns of meta tensors: shapes.  Nothing is sent."""
    wide = getattr(torch, layout.accumulator)
    top, total = (q.new_empty(q.shape[:3], dtype=wide) for _ in range(2))
    return q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide), top, total


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


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes that are given: autocast has had its say before."""
    if not torch.amp.is_autocast_available(device.type):  # as of meta tensors
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
