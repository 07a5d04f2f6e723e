"""Exact cross-attention over keys and values that are spread over ranks: the front door.

It agrees on a layout, unless it is given one, and hands over to the schedule, by way of autograd.
"""

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter

from .autograd import Attention, Backward, Forward
from .gather import gather, gather_backward
from .group import AnyGroup, Group
from .layout import Layout, Pool
from .lazy import not_compiled
from .lv_xattn import lv_xattn, lv_xattn_backward
from .replicated import replicated, replicated_backward
from .ring_attention import ring_attention, ring_attention_backward
from .ulysses import ulysses, ulysses_backward

FORWARD = {"lv-xattn": lv_xattn, "ring": ring_attention, "ulysses": ulysses, "gather": gather}
BACKWARD = {
    "lv-xattn": lv_xattn_backward,
    "ring": ring_attention_backward,
    "ulysses": ulysses_backward,
    "gather": gather_backward,
}


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, group: AnyGroup = None, *,
    return_lse: Literal[False] = False, **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, group: AnyGroup = None, *,
    return_lse: Literal[True], **options: Any,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@not_compiled
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: AnyGroup = None,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: Tensor | MaskRule | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    return_lse: bool = False,
    meter: Meter | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank of the group calls this.  Differentiable, once; its backward is
    collective too, so that every rank's loss has to depend on its out, be it times 0, and backwards
    of several calls have to come in the same order on all ranks.  Another order is a RuntimeError
    where blocks go through the host's memory, and wrong gradients with NCCL.

    Parameters
    ----------
    q : (B, H, s_q, D)
        This rank's queries.
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
        This rank's keys and values; H is a multiple of H_KV, and head h reads group
        ``h // (H // H_KV)``.  Lengths may differ between ranks and may be 0.
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        The world unless given; this process alone where torch.distributed was not initialised.
        Messages use tags 7001 and 7002 of it.
    schedule : str
        What travels: ``"lv-xattn"``, the queries, round a ring; ``"gather"``, the queries, all at
        once; ``"ring"``, the keys and values, round a ring; ``"ulysses"``, everything, so that each
        rank has all lengths of a share of the heads (P must divide H_KV); ``"auto"``, whichever
        sends the fewest bytes.  Ignored where `layout` is given, or queries are replicated.
    scale : float, optional
        ``1 / sqrt(D)`` unless given.
    mask : Tensor or callable, optional
        What this rank's keys look like to every query: bool (True = may attend) or additive float,
        broadcastable to (B, H, S_Q, s_kv), its query axis 1 or all ranks' queries in rank order,
        its last axis exactly this rank's keys; or ``mask(b, h, q_index, kv_index) -> bool`` on
        broadcastable tensors of global indices.  With ``"ring"`` and ``"ulysses"`` a callable is
        asked about the keys of all ranks, so that it must be the same rule on every rank.  What is
        hidden must be finite all the same: 0 times NaN is NaN.  A constant: it gets no gradient.
        On CUDA a bool mask is faster than an additive one, whose forward takes no fused kernel.
    queries : str
        ``"sharded"``, or ``"replicated"``: every rank holds all queries, gets out for all of them,
        and computes the same loss from it, as where the text model is not spread.
    layout : Layout, optional
        From `Layout.agree`, to agree once for many calls.
    return_lse : bool
        Whether to return lse, too.
    meter : Meter, optional
        Is added to: messages, bytes, seconds; of the backward, too.

    Returns
    -------
    out : (B, H, s_q, D_V), q's dtype
        Under autocast in its dtype, as `torch.nn.functional.scaled_dot_product_attention` has it.
    lse : (B, H, s_q), float32, or float64 where q is
        With `return_lse`.  Natural log; -inf, with out = 0, where a query may attend to nothing.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected, what was given and the rank; on every rank alike,
        before anything is sent, unless `layout` is given: then on the rank that misfits.
    RuntimeError
        A block did not come within the group's timeout, or another rank has ended: names this
        rank, the block and the rank that it should have come from; its cause is what the group
        said.  So does the backward.

    After that, or whatever else is raised later than the checks, as by a callable mask, blocks may
    still be under way: do not use the group again.  End the program, as torchrun does when one of
    its ranks ends, or at least make another group.
    """
    comm = Group.of(group)
    dtype = autocast_dtype(q)
    q, k, v = (cast(x, dtype) for x in (q, k, v))
    call = call_of(q, k, v, return_lse=return_lse)
    layout = agreed(
        q, k, v, comm, layout,
        schedule=schedule, scale=scale, mask=mask, queries=queries, call=call,
    )  # fmt: skip
    given = q, k, v, mask, comm, layout, *passes(layout, comm), meter
    out, lse = Attention.apply(*given)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def agreed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    layout: Layout | None,
    *,
    schedule: str,
    scale: float | None,
    mask: Tensor | MaskRule | None,
    queries: str,
    call: str,
) -> Layout:
    """Return the layout given, checked against this rank's arguments, or agree on one."""
    if layout is None:
        layout = Layout.agree(
            q, k, v, group, schedule=schedule, scale=scale, mask=mask, queries=queries, call=call
        )
        return replace(layout, pool=Pool(keeps=False))
    layout.check(q, k, v, group, scale=scale, mask=mask, queries=queries)
    return layout


def passes(layout: Layout, group: Group) -> tuple[Forward, Backward]:
    """Return forward and backward of what the layout says; what they raise names this rank."""
    forward, backward = FORWARD[layout.schedule], BACKWARD[layout.schedule]
    if layout.queries == "replicated":
        forward, backward = replicated, replicated_backward
    named = group.named()
    return named(forward), named(backward)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast wants on the device of x, or None where it is off."""
    if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return x in autocast's dtype, if that is one that it would be cast to for SDPA."""
    if dtype is None or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x if x.dtype == torch.float64 else x.to(dtype)


def call_of(*tensors: Tensor | None, return_lse: bool) -> str:
    """Say what is called, in words that are equal on all ranks unless one would be left waiting."""
    wanted = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)
    name = "forward and backward" if wanted else "forward"
    return f"{name}, with lse" if return_lse else name
