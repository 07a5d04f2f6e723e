"""Exact cross-attention over keys and values that are sharded over ranks: the front door.

It agrees on a layout, unless one is given, and calls the schedule through autograd.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.validation import on_rank

from .autograd import Attention, Schedule, not_compiled, wanted_of
from .gather import gather, gather_backward
from .grid import grid as grid_attention
from .grid import grid_backward
from .group import AnyGroup, Group
from .layout import Layout
from .lv_xattn import lv_xattn, lv_xattn_backward
from .replicated import (
    replicated_keys,
    replicated_keys_backward,
    replicated_queries,
    replicated_queries_backward,
)
from .ring_attention import ring_attention, ring_attention_backward
from .ulysses import ulysses, ulysses_backward

# Forward and backward by `Layout.way`: the schedule, or what every rank has the whole of.
SCHEDULE_FUNCTIONS: dict[str, tuple[Schedule, Schedule]] = {
    "lv-xattn": (lv_xattn, lv_xattn_backward),
    "ring": (ring_attention, ring_attention_backward),
    "ulysses": (ulysses, ulysses_backward),
    "gather": (gather, gather_backward),
    "grid": (grid_attention, grid_backward),
    "replicated": (replicated_queries, replicated_queries_backward),
    "replicated keys": (replicated_keys, replicated_keys_backward),
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
def cross_attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: AnyGroup = None,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: Tensor | MaskRule | None = None,
    queries: str = "sharded",
    keys: str = "sharded",
    grid: tuple[int, int] | None = None,
    layout: Layout | None = None,
    return_lse: bool = False,
    meter: Meter | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank of the group calls this.  Differentiable, once; its backward is
    collective too.  So every rank's loss must depend on its out, if only by a factor of 0, and the
    backwards of several calls must come in the same order on all ranks.  Another order raises a
    RuntimeError where blocks go through host memory, and gives wrong gradients with NCCL.

    Parameters
    ----------
    q : (B, H, s_q, D)
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
        This rank's queries, keys and values.
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        Default: the world, or this process alone where torch.distributed is not initialised.
        Messages use tags 7001 and 7002 of it.
    schedule, scale, grid, layout
        As in `lvxattn.reference.cross_attention`.
    mask : Tensor or callable, optional
        As there.  It gets no gradient.  On CUDA a bool mask is faster than an additive one, whose
        forward uses no fused kernel.
    queries : str
        As there.  With ``"replicated"`` every rank must compute the same loss.
    keys : str
        As there.  With ``"replicated"`` the gradients of k and v are complete on every rank.
    return_lse : bool
        Whether to return lse too.
    meter : Meter, optional
        Adds up messages, bytes and seconds, of the backward too.

    Returns
    -------
    out : (B, H, s_q, D_V), q's dtype
        Under autocast its dtype, as for `torch.nn.functional.scaled_dot_product_attention`.
    lse : (B, H, s_q), float32, or float64 where q is
        With `return_lse`.  Natural log; -inf, with out = 0, where a query may attend to no key.

    Raises
    ------
    ValueError, TypeError
        As `lvxattn.reference.cross_attention`.
    RuntimeError
        In the forward or the backward: a block did not arrive within the group's timeout, or
        another rank has ended.  Names this rank, the block and its source; the cause is the group's
        error.

    Notes
    -----
    After a RuntimeError, or any error raised later than the checks, as by a callable mask, messages
    may be pending: do not use the group again.  End the program, as torchrun does when a rank ends,
    or at least make another group.

    Examples
    --------
    Here with one process; under ``torchrun --nproc-per-node 4`` the same runs on four.

    >>> import torch
    >>> from lvxattn.torch_impl import cross_attention
    >>> q, k, v = (torch.ones(1, 2, s, 8, requires_grad=True) for s in (6, 50, 50))  # this rank's
    >>> out = cross_attention(q, k, v)
    >>> out.sum().backward()
    >>> out.shape, v.grad.shape
    (torch.Size([1, 2, 6, 8]), torch.Size([1, 2, 50, 8]))
    """
    dtype = autocast_dtype(q)
    q, k, v = (cast(x, dtype) for x in (q, k, v))
    return attend(
        q, k, v, group, layout, schedule=schedule, scale=scale, mask=mask, queries=queries,
        keys=keys, grid=grid, return_lse=return_lse, meter=meter,
    )  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, group: AnyGroup, layout: Layout | None, made: Any = None,
    *, mask: Any, meter: Meter | None, **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend by an operator in a program that is compiled, else by `Attention`."""
    if is_compiled(mask, meter):
        from . import operators  # which imports the compiler

        return operators.attend(q, k, v, group, layout, mask=mask, **options)
    return attend_now(q, k, v, Group.of(group), layout, made, mask=mask, meter=meter, **options)


def is_compiled(mask: Tensor | MaskRule | None, meter: Meter | None) -> bool:
    """Return whether a call is being compiled: operators take no callable masks, and no meters."""
    return torch.compiler.is_compiling() and meter is None and not callable(mask)


@not_compiled
def attend_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    layout: Layout | None,
    made: Any = None,
    *,
    schedule: str,
    scale: float | None,
    mask: Tensor | MaskRule | None,
    queries: str,
    keys: str,
    grid: tuple[int, int] | None = None,
    return_lse: bool,
    meter: Meter | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check the layout or agree on one, and apply `Attention`, which saves q, k and v or `made`."""
    if layout is None:
        layout = Layout.agree_once(
            q, k, v, group, schedule=schedule, scale=scale, mask=mask, queries=queries, keys=keys,
            grid=grid, gradients=gradients_of(q, k, v) or "qkv",
            call=call_of(q, k, v, return_lse=return_lse),
        )  # fmt: skip
    else:
        layout.check(q, k, v, group, scale=scale, mask=mask, queries=queries, keys=keys)
        check_gradients(layout, gradients_of(q, k, v))
    given = q, k, v, mask, group, layout, SCHEDULE_FUNCTIONS[layout.way], meter, made
    out, lse = Attention.apply(*given)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on the device of x, or None where it is off."""
    if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return x in autocast's dtype if SDPA would cast it: if it is floating, but not float64."""
    if dtype is None or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x if x.dtype == torch.float64 else x.to(dtype)


def call_of(*tensors: Tensor | None, return_lse: bool) -> str:
    """Describe the call: ranks whose descriptions differ would wait for one another forever."""
    wanted = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)
    name = "forward and backward" if wanted else "forward"
    return f"{name}, with lse" if return_lse else name


def gradients_of(*tensors: Tensor) -> str:
    """Return the arguments, of q, k and v, whose gradients are wanted."""
    if not torch.is_grad_enabled():
        return ""
    return wanted_of(*(getattr(x, "requires_grad", False) for x in tensors))


def check_gradients(layout: Layout, gradients: str) -> None:
    """Check that a layout's backward computes all gradients that are wanted.  Not collective.

    Raises
    ------
    ValueError
        On this rank only.
    """
    for name in gradients:
        if name not in layout.gradients:
            error = ValueError(
                f"{name}: expected no tensor that requires a gradient, as the layout was agreed on "
                f"with gradients={layout.gradients!r}, got one"
            )
            raise on_rank(error, layout.rank, layout.size)
