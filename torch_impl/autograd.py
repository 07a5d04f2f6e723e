"""The autograd function of the attention, and what keeps autocast and torch.compile out of it.

What it calls, `compute` and `differentiate`, is also called by the operators of compiled programs.

The schedules are plain functions on tensors.  Saved between forward and backward are q, k, v, out,
lse and the rounding error of lse; of q, k and v nothing where a layer recomputes them
(`recompute`).  The layout is saved too, so that a backward sends nothing but blocks.

A backward is collective like its forward: the loss of every rank must depend on its out, if only by
a factor of 0, and all ranks must run the backward of their loss.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.wire import QUERIES

from .block_attention import block_attention_backward, delta_of
from .exchange import Exchange
from .group import Group
from .layout import Layout
from .merge import lse_of, lse_remainder_of

Schedule = Callable[..., tuple[Tensor, Tensor, Tensor]]

UNCOMPILED = "a mask that is a callable, and a meter, are not compiled"


class Attention(torch.autograd.Function):
    """``(q, k, v) -> (out, lse)`` by a schedule's forward, and its backward.

    It saves q, k and v unless `made` is given, a node of the graph that has saved them.
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
        functions: tuple[Schedule, Schedule],
        meter: Meter | None,
        made: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention, and save what the backward needs."""
        ctx.set_materialize_grads(False)
        out, lse, lse_remainder = compute(q, k, v, mask, group, layout, functions[0], meter)
        held = (q, k, v) if made is None else ()
        save(ctx, mask, *held, out, lse, lse_remainder)
        ctx.made = made
        ctx.group, ctx.layout, ctx.meter = group, layout.numbered(), meter
        ctx.backward = functions[1]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        (*held, out, lse, lse_remainder), mask = saved(ctx)
        q, k, v = held or ctx.made.saved_tensors
        wanted = wanted_of(*ctx.needs_input_grad[:3])
        grads = differentiate(
            dout, dlse, q, k, v, mask, out, lse, lse_remainder, ctx.group, ctx.layout,
            ctx.backward, wanted, ctx.meter,
        )  # fmt: skip
        return *grads, *[None] * 6


def compute(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskRule | None, group: Group, layout: Layout,
    forward: Schedule, meter: Meter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, lse and the rounding error of lse, by a schedule's forward.

    Collective: every rank of the group calls this.
    """
    with group.named(), exactly(q.device):  # errors name this rank
        if q.is_meta and layout.size > 1:
            out, top, total = shapes(q, v, layout)
        else:
            exchange = Exchange(group, layout, q, mask, meter)
            out, top, total = forward(q, k, v, exchange)
            exchange.finish()
        lse = lse_of(top, total)
        return heads_last(out.to(q.dtype)), lse, lse_remainder_of(lse, top, total)


def differentiate(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | MaskRule | None, out: Tensor, lse: Tensor, lse_remainder: Tensor,
    group: Group, layout: Layout, backward: Schedule, wanted: str, meter: Meter | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of q, k and v, in their dtypes, by a schedule's backward.

    Collective: every rank of the group calls this.  `wanted` are those that this rank wants, of the
    layout's; for the others it returns None.
    """
    assert set(wanted) <= set(layout.gradients)
    if q.is_meta and layout.size > 1:
        return [
            torch.empty_like(x) if n in wanted else None
            for n, x in zip("qkv", (q, k, v), strict=True)
        ]
    with group.named(), exactly(q.device):
        # dout in q's dtype, as on the ranks that it visits.
        dout = torch.zeros_like(out) if dout is None else dout.to(q.dtype)
        dout, delta = delta_of(dout, out, lse, lse_remainder, dlse)
        exchange = Exchange(group, layout, q, mask, meter, wanted)
        if layout.size == 1:
            # Nothing else is added to dk and dv: a kernel may round its own sums.
            with exchange.computing(what=QUERIES.name):
                dq, dk, dv = block_attention_backward(
                    dout, q, k, v, lse, delta, scale=exchange.scale,
                    mask=exchange.mask_view(hop=0), wanted=exchange.wanted, dtype=k.dtype,
                )  # fmt: skip
        else:
            dq, dk, dv = backward(dout, q, k, v, lse, delta, exchange)
        exchange.finish()
        return [
            x.to(q.dtype) if name in wanted else None
            for name, x in zip("qkv", (dq, dk, dv), strict=True)
        ]


def wanted_of(q: bool, k: bool, v: bool) -> str:
    """Return the arguments whose gradients are computed: those of k and v together."""
    return "q" * q + "kv" * (k or v)


def heads_last(x: Tensor) -> Tensor:
    """Return x (B, H, s, D), in memory (B, s, H, D): joining the heads needs no copy then."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def shapes(q: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of a forward of meta tensors over ranks, without sending anything."""
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
    """Return the tensors and the mask that `save` has saved."""
    tensors = list(ctx.saved_tensors)
    held = tensors[ctx.count :]
    return tensors[: ctx.count], held[0] if held else ctx.rule


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, which has been applied to the arguments before."""
    if not torch.amp.is_autocast_available(device.type):  # as for meta tensors
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that ``torch.compile`` calls without compiling it, by a graph break.

    ``torch.compiler.disable`` does the same, but imports the compiler, which takes seconds, even
    where nothing is compiled.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=UNCOMPILED))
        return disabled[0](*args, **kwargs)

    return call
