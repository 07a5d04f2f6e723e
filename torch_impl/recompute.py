r"""Checkpointing: a cross-attention layer that recomputes keys and values in its backward.

    k, v = make_kv(y)     out, lse = cross_attention(q, k, v)

All cross-attention layers of a model read the same visual features y.  A layer that saves q, y, out
and lse saves y once for the whole model; keys and values would be saved for every layer.  The
backward calls make_kv again.  Where that projects y, this costs two matrix products, and gradients
follow from dk and dv by

    k = y W_k     v = y W_v     dy = dk W_k^T + dv W_v^T     dW_k = y^T dk     dW_v = y^T dv

Gradients of the weights are this rank's partial sums: add them up over the ranks, once a step.

The steps are those of the other implementations; the code is not.  Here autograd runs the backward,
that of make_kv included, and `torch.utils.checkpoint` calls make_kv again with the forward's
autocast and random numbers.  So its parameters get gradients, its hooks run and its intermediate
results are not saved, as in any checkpointed part of a model.

Source: arXiv:2502.02406, section 3.3.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.validation import (
    Forms,
    attempt,
    check_here_or_together,
    check_made,
    forms,
)

from .autograd import not_compiled
from .cross_attention import attend_now, autocast_dtype, cast, is_compiled
from .group import AnyGroup, Group
from .layout import Layout, check_tensors

MakeKV = Callable[[Any], tuple[Tensor, Tensor]]


@overload
def cross_attention_layer(
    q: Tensor, y: Any, make_kv: MakeKV, group: AnyGroup = None, *,
    return_lse: Literal[False] = False, **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def cross_attention_layer(
    q: Tensor, y: Any, make_kv: MakeKV, group: AnyGroup = None, *,
    return_lse: Literal[True], **options: Any,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def cross_attention_layer(  # type: ignore[misc]
    q: Tensor,
    y: Any,
    make_kv: MakeKV,
    group: AnyGroup = None,
    *,
    make_q: Callable[[Tensor], Tensor] | None = None,
    recompute: bool = True,
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
    """Compute keys and values from visual features, attend to them, and do not save them.

    Collective: every rank of the group calls this, and its backward.  Differentiable, once, with
    respect to q, y and all parameters that `make_kv` uses.

    Parameters
    ----------
    q : (B, H, s_q, D)
        This rank's queries; all of them where queries are replicated.
    y : (B, s_kv, E_V)
        This rank's visual features, or any other argument of `make_kv`.
    make_kv : callable
        ``make_kv(y) -> (k, v)``, of shapes (B, H_KV, s_kv, D) and (B, H_KV, s_kv, D_V).  The
        backward calls it again, as `torch.utils.checkpoint.checkpoint` does: hooks run again, and
        it must return the same from the same weights.  A function with state that each call changes
        does not, such as spectral norm in training.
    make_q : callable, optional
        Computes the queries from the argument q, such as text features, which other parts of a
        model save in any case.  The queries are then recomputed too, and q is saved.
    recompute : bool
        Whether to recompute; False saves keys and values.  Ranks may differ.
    group, schedule, scale, mask, queries, keys, grid, layout, return_lse, meter
        As in `cross_attention`.

    Returns
    -------
    out : (B, H, s_q, D_V)
    lse : (B, H, s_q)
        With `return_lse`; both as from `cross_attention`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `cross_attention`, and for the return value of make_kv; also what make_kv raises.  From
        the backward, on this rank only, where make_kv returns other shapes or dtypes than in the
        forward, or has used other weights, or weights that were changed in place, as by
        `torch.func.functional_call`.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import cross_attention_layer
    >>> q, y = torch.ones(1, 2, 6, 8), torch.ones(1, 50, 3)  # this rank's
    >>> project = torch.nn.Linear(3, 2 * 8)
    >>> def make_kv(y):
    ...     heads = project(y).unflatten(2, (2, 8)).transpose(1, 2)
    ...     return heads, heads
    >>> cross_attention_layer(q, y, make_kv).sum().backward()
    >>> project.weight.grad.shape
    torch.Size([16, 3])
    """
    given = q, y, make_kv, group, layout, make_q
    options: dict[str, Any] = {
        "recompute": recompute, "schedule": schedule, "scale": scale, "mask": mask,
        "queries": queries, "keys": keys, "grid": grid, "return_lse": return_lse,
    }  # fmt: skip
    if is_compiled(mask, meter):
        from . import operators  # which imports the compiler

        return operators.layer(*given, **options)
    return _layer(*given, meter=meter, **options)


@not_compiled
def _layer(
    q: Tensor,
    y: Any,
    make_kv: MakeKV,
    group: AnyGroup,
    layout: Layout | None,
    make_q: Callable[[Tensor], Tensor] | None,
    *,
    recompute: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `cross_attention_layer` with autograd's own functions."""
    comm = Group.of(group)
    before: list[tuple[Forms, _Leaves]] = []

    def make(x: Tensor, y: Any) -> Any:
        """Return q, k and v, saved; called by the forward, and again by the backward."""
        again, together = bool(before), layout is None and not before

        def both() -> tuple[Tensor, Any]:
            q = x if make_q is None else make_q(x)
            return q, make_kv(y) if callable(make_kv) else None

        with comm.named():
            made = attempt(both, comm, together=together)
        failed = isinstance(made, Exception)  # which is raised below
        q, kv = (x, made) if failed else made
        dtype = autocast_dtype(q)
        q = cast(q, dtype)
        if isinstance(kv, tuple | list):
            kv = tuple(cast(a, dtype) for a in kv)
        check_here_or_together(
            lambda: check_made(make_kv, kv, q, before[0][0] if again else None, also), comm,
            together=together,
        )  # fmt: skip
        leaves = _leaves_of((q, *kv), (x, y))
        if again:
            _check_leaves(before[0][1], leaves, comm)
        else:
            before.append((forms(kv), leaves))
        return Made.apply(q, *kv)  # type: ignore[no-untyped-call]

    def also(q: Tensor, k: Tensor, v: Tensor) -> None:
        if not isinstance(q, Tensor):
            raise TypeError(f"q: expected a torch tensor, got {type(q).__name__}")
        check_tensors(q, k, v, None, comm)

    # 1. Compute keys and values.
    q, k, v = checkpoint(make, q, y, use_reentrant=False) if recompute else make(q, y)
    # 2. Attend to them; they are freed at the end of this call.
    # 3. Recompute them, and differentiate the attention.
    return attend_now(q, k, v, comm, layout, node_of(q, k, v), **options)


class Made(torch.autograd.Function):
    """Return q, k and v unchanged, but save them: in a checkpoint, reading them recomputes them.

    The attention is outside of the checkpoint, so that it is not recomputed, and reads them here.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Save the tensors."""
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # of frozen keys, as large as these
        frozen = [x for x, needed in zip(tensors, ctx.needs_input_grad, strict=True) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return tensors

    @staticmethod
    def backward(_: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients unchanged."""
        return grads


def node_of(*made: Tensor) -> Any:
    """Return the node of `Made`, whose results are not all differentiable, or None."""
    return next((x.grad_fn for x in made if x.grad_fn is not None), None)


# The leaves of a graph, where gradients are accumulated, and the versions of their data.
_Leaves = dict[Tensor, int]


def _leaves_of(made: Iterable[Tensor], given: Iterable[Any]) -> _Leaves:
    """Return the leaves of the graph from the arguments of make_kv to its return value."""
    leaves: _Leaves = {}
    nodes: list[Any] = [x.grad_fn for x in made]
    seen = {None, *(x.grad_fn for x in given if isinstance(x, Tensor))}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a gradient is accumulated
            leaves[node.variable] = node.variable._version
        nodes += [following for following, _ in node.next_functions]
    return leaves


def _check_leaves(before: _Leaves, after: _Leaves, comm: Group) -> None:
    """Check that the leaves are those of the forward: others would get its gradients.

    Raises
    ------
    RuntimeError
        On this rank only.
    """
    other = [tuple(x.shape) for x in before.keys() ^ after.keys()]
    changed = [tuple(x.shape) for x in before.keys() & after.keys() if before[x] != after[x]]
    if not other and not changed:
        return
    what = f"others, of shapes {other}" if other else f"shapes {changed} changed in place"
    raise RuntimeError(
        f"make_kv: expected the features and weights of the forward in the backward, got {what}; "
        f"recompute_kv=False keeps what was made of them (on {comm.name})"
    )
