r"""The attention as an operator, for compiled and exported programs.

`torch.compile` and `torch.export` see one operator forward and one backward, and nothing of what is
inside: the agreement of the ranks, the schedule, the messages.  All that an operator is given and
returns is in its signature, so that a backward finds its forward's layout in a tensor:

    attention(q, k, v, mask, ..., group, ranks, schedule, ...) -> out, lse, lse_remainder, record
    attention_backward(dout, dlse, q, k, v, mask, out, lse, lse_remainder, record, group) -> dq, ...

`record` is the layout as text, in bytes of a number that follows from the number of ranks.  A group
is given by its name.  Shapes are those of the tensors at the time of a call: other lengths of the
text, on other ranks and in other steps, are no reason to compile again.

Both are collective.  A compiler may drop what nothing reads, and reorder what does not depend on
one another, and it may do so on one rank only, for the sake of its own shapes.  So both have an
effect, as a print has: they are kept, in the order of the program, on all ranks.

Without a compiler, `autograd.Attention` does the same, and takes callable masks and meters too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from .autograd import compute, differentiate, heads_last, wanted_of
from .cross_attention import (
    SCHEDULE_FUNCTIONS,
    autocast_dtype,
    call_of,
    cast,
    check_gradients,
    gradients_of,
)
from .group import AnyGroup, Group
from .layout import Layout, record_nbytes


@torch.library.custom_op("lvxattn::attention", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layout: Tensor | None,
    number: Tensor | None,
    group: str,
    ranks: int,
    schedule: str,
    scale: float | None,
    queries: str,
    keys: str,
    gradients: str,
    grid: Sequence[int] | None,
    call: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the attention, after the ranks have agreed unless a layout's record is given.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    q, k, v, mask, schedule, scale, queries, keys, grid
        As given to `cross_attention`; a mask is a tensor.
    layout : (N,), uint8, optional
        A layout's record.
    number : (), int64, optional
        With a layout, the number of this forward.
    group : str
    ranks : int
        The group's name, and the number of its ranks.
    gradients : str
        The arguments whose gradients this rank wants.
    call : str
        Describes the call; must be equal on all ranks.

    Returns
    -------
    out, lse, lse_remainder
        As from `autograd.compute`.
    record : (N,), uint8
        The layout's, numbered.
    """
    comm = Group.of_program(group, ranks)
    if layout is None:
        agreed = Layout.agree_once(
            q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries, keys=keys,
            gradients=gradients or "qkv", grid=grid, call=call,
        )  # fmt: skip
    else:
        agreed = Layout.of_record(layout)
        agreed.check(q, k, v, comm, scale=scale, mask=mask, queries=queries, keys=keys)
        check_gradients(agreed, gradients)
    forward = SCHEDULE_FUNCTIONS[agreed.way][0]
    out, lse, lse_remainder = compute(q, k, v, mask, comm, agreed, forward)
    record = agreed.numbered(None if number is None else int(number)).to_record()
    # In the memory that the compiler has been told of.
    return out, lse.contiguous(), lse_remainder.contiguous(), record


@attention.register_fake
def _(
    q: Tensor,
    _k: Any,
    v: Tensor,
    _mask: Any,
    _layout: Any,
    _number: Any,
    _group: Any,
    ranks: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (B, H, s, D), got shape {tuple(x.shape)}")
    B, H, s_q, _D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    lse, lse_remainder = (q.new_empty((B, H, s_q), dtype=wide) for _ in range(2))
    record = torch.empty(record_nbytes(ranks), dtype=torch.uint8, device="cpu")
    return _heads_last_like(q, v.shape[3]), lse, lse_remainder, record


@torch.library.custom_op(
    "lvxattn::attention_backward", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe]
)
def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_remainder: Tensor,
    record: Tensor,
    group: str,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; those that are not `wanted` are empty.

    Collective: every rank of the group calls this.  Arguments are the gradients of out and lse,
    None where there is none, and what `attention` was given and has returned.
    """
    layout = Layout.of_record(record)
    comm = Group.of_program(group, layout.size)
    backward = SCHEDULE_FUNCTIONS[layout.way][1]
    dq, dk, dv = (
        q.new_empty(0) if x is None else heads_last(x)
        for x in differentiate(
            dout, dlse, q, k, v, mask, out, lse, lse_remainder, comm, layout, backward, wanted
        )
    )
    return dq, dk, dv


@attention_backward.register_fake
def _(
    _dout: Any, _dlse: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = others[-1]
    dq, dk, dv = (
        _heads_last_like(x) if name in wanted else x.new_empty(0)
        for name, x in zip("qkv", (q, k, v), strict=True)
    )
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, _, _, group, *_ = inputs
    if ctx.needs_input_grad[3]:
        raise ValueError("mask: expected a constant, got a tensor that requires a gradient")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.group = group


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    wanted = wanted_of(*ctx.needs_input_grad[:3])
    grads = torch.ops.lvxattn.attention_backward(dout, dlse, *ctx.saved_tensors, ctx.group, wanted)
    kept = [x if name in wanted else None for name, x in zip("qkv", grads, strict=True)]
    return *kept, *[None] * 12


def _no_second_derivative(*_: Any) -> None:
    raise RuntimeError("cross_attention: expected to be differentiated once, got a second time")


attention.register_autograd(_backward, setup_context=_save)
attention_backward.register_autograd(_no_second_derivative)


def _save_always(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Save the operator's results in a checkpoint that a compiler traces: no effect comes twice."""
    policy = mode.policy_fn
    mode.policy_fn = lambda *_, **__: CheckpointPolicy.MUST_SAVE
    try:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    finally:
        mode.policy_fn = policy


# Compilers before fail where a backward has effects: there the order is left to the compiler.
if TorchVersion(torch.__version__) >= "2.13":
    from torch._library.effects import EffectType
    from torch.utils.checkpoint import _CachingTorchDispatchMode

    for op in (attention, attention_backward):
        op.register_effect(EffectType.ORDERED)
    attention.register_torch_dispatch(_CachingTorchDispatchMode, _save_always)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: AnyGroup,
    layout: Layout | None,
    *,
    schedule: str,
    scale: float | None,
    mask: Tensor | None,
    queries: str,
    keys: str,
    grid: tuple[int, int] | None = None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `cross_attention` as one operator in a program that is being compiled or exported.

    Parameters
    ----------
    q, k, v, group, layout, schedule, scale, mask, queries, keys, grid, return_lse
        As given to `cross_attention`.
    """
    name, ranks = Group.in_program(group)
    call = call_of(q, k, v, return_lse=return_lse)
    # An exported program may be called with other tensors frozen.
    gradients = "" if torch.compiler.is_exporting() else gradients_of(q, k, v)
    given = number = None
    if layout is not None:
        if layout.structures:
            raise ValueError(
                "layout: expected one for no mask or a tensor in a compiled program, "
                "got one that was agreed on with a Rule"
            )
        given, number = layout.record, layout.forwards.advance()
    out, lse, *_ = torch.ops.lvxattn.attention(
        q, k, v, mask, given, number, name, ranks, schedule, scale, queries, keys,
        gradients, grid, call,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def layer(
    q: Tensor,
    y: Any,
    make_kv: Callable[[Any], tuple[Tensor, Tensor]],
    group: AnyGroup,
    layout: Layout | None,
    make_q: Callable[[Tensor], Tensor] | None,
    *,
    recompute: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `cross_attention_layer` in a program that is being compiled or exported.

    What the operator saves is q, k and v.  They are computed in a checkpoint, so that the compiler
    computes them again in the backward, from x and y, and saves neither.
    """

    def make(x: Tensor, y: Any) -> tuple[Tensor, Tensor, Tensor]:
        q = x if make_q is None else make_q(x)
        k, v = make_kv(y)
        dtype = autocast_dtype(q)
        return cast(q, dtype), cast(k, dtype), cast(v, dtype)

    again = recompute and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    q, k, v = checkpoint(make, q, y, use_reentrant=False) if again else make(q, y)
    return attend(q, k, v, group, layout, **options)


def _heads_last_like(x: Tensor, width: int | None = None) -> Tensor:
    B, H, s, D = x.shape
    return x.new_empty((B, s, H, D if width is None else width)).transpose(1, 2)
