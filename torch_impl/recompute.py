r"""A cross-attention layer that forgets its keys and values, and makes them again in the backward.

    q = x W_q     k = y W_k     v = y W_v     out, lse = cross_attention(q, k, v)

All cross-attention layers of a model read the same visual features y, so a layer that keeps only
x, y, out and lse keeps y once for the whole model, where keys and values would be kept for every
layer.  The backward makes k and v again, at the price of two matrix products:

    dx   = dq W_q^T                  dy   = dk W_k^T + dv W_v^T
    dW_q = x^T dq                    dW_k = y^T dk       dW_v = y^T dv

Gradients of the weights are this rank's partial sums: add them up over the ranks, once a step.

Source: arXiv:2502.02406, section 3.3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.reference.validation import check_here_or_together, check_layer
from lvxattn.torch_impl.autograd import attend, differentiate, exactly, save, saved
from lvxattn.torch_impl.cross_attention import agreed, autocast_dtype, call_of, cast, passes
from lvxattn.torch_impl.group import AnyGroup, Group
from lvxattn.torch_impl.layout import Layout, check_tensor


@torch.compiler.disable
def cross_attention_layer(
    x: Tensor,
    y: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    group: AnyGroup = None,
    *,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: Tensor | MaskRule | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> Tensor:
    """Project text and visual features, and attend from the one to the other.

    Collective: every rank of the group calls this.  Differentiable, once; its backward is
    collective too.

    Parameters
    ----------
    x : (B, s_q, E)
        This rank's text features; all of them where queries are replicated.
    y : (B, s_kv, E_V)
        This rank's visual features.
    w_q : (E, H, D)
    w_k : (E_V, H_KV, D)
    w_v : (E_V, H_KV, D_V)
        Weights, equal on all ranks.  Their gradients are this rank's partial sums; where queries
        are replicated, that of w_q is whole on every rank.
    b_q : (H, D), optional
    b_k : (H_KV, D), optional
    b_v : (H_KV, D_V), optional
        Biases, likewise.
    group, schedule, scale, mask, queries, layout, meter
        As in `cross_attention`.

    Returns
    -------
    out : (B, H, s_q, D_V)
        Laid out in memory as (B, s_q, H, D_V), so that what follows can take it as it is.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `cross_attention`, for x, y and the weights too.
    """
    comm = Group.of(group)
    inputs = x, y, w_q, w_k, w_v, b_q, b_k, b_v
    check_here_or_together(lambda: _check_inputs(*inputs), comm, together=layout is None)
    options = {
        "schedule": schedule, "scale": scale, "mask": mask, "queries": queries,
        "call": call_of(*inputs, return_lse=False),
    }  # fmt: skip
    return Layer.apply(*inputs, comm, layout, options, meter)  # type: ignore[no-untyped-call]


def _check_inputs(
    x: Tensor,
    y: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
) -> None:
    """Check features, weights and biases, in the dtypes that autocast leaves of them.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what was given.
    """
    biases = {"b_q": (b_q, w_q), "b_k": (b_k, w_k), "b_v": (b_v, w_v)}
    tensors = {"x": x, "y": y, "w_q": w_q, "w_k": w_k, "w_v": w_v}
    for name, given in (tensors | {name: bias for name, (bias, _) in biases.items()}).items():
        check_tensor(name, given, x, of="x")
    dtype = autocast_dtype(x)
    check_layer(*(cast(given, dtype) for given in tensors.values()))
    for name, (bias, weight) in biases.items():
        if bias is None:
            continue
        expected = tuple(weight.shape[1:])
        if not isinstance(bias, Tensor) or tuple(bias.shape) != expected:
            got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise ValueError(f"{name}: expected shape {expected} as w{name[1:]} has it, got {got}")
        if cast(bias, dtype).dtype != cast(x, dtype).dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {bias.dtype}")


class Layer(torch.autograd.Function):
    """``(x, y, weights, biases) -> out``, keeping x, y, out and lse: no keys, no values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        w_q: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        b_q: Tensor | None,
        b_k: Tensor | None,
        b_v: Tensor | None,
        group: Group,
        layout: Layout | None,
        options: dict[str, Any],
        meter: Meter | None,
    ) -> Tensor:
        """Project and attend."""
        ctx.dtype, ctx.group, ctx.meter = autocast_dtype(x), group, meter
        with exactly(x.device):
            q, k, v = _heads(ctx.dtype, x, y, w_q, w_k, w_v, b_q, b_k, b_v)
            ctx.layout = agreed(q, k, v, group, layout, **options)
            forward, _ = passes(ctx.layout, group)
            out, lse, low = attend(
                forward, q, k, v, group, ctx.layout, mask=options["mask"], meter=meter
            )
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        biases = [b for b in (b_q, b_k, b_v) if b is not None]
        ctx.biased = [b is not None for b in (b_q, b_k, b_v)]
        save(ctx, options["mask"], x, y, w_q, w_k, w_v, out, lse, low, *biases)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate, making keys and values again."""
        (x, y, w_q, w_k, w_v, out, lse, low, *held), mask = saved(ctx)
        biases = [held.pop(0) if there else None for there in ctx.biased]
        with exactly(x.device):
            # 1. Make again what was forgotten.
            q, k, v = _heads(ctx.dtype, x, y, w_q, w_k, w_v, *biases)
            # 2. Through the attention.
            _, backward = passes(ctx.layout, ctx.group)
            dq, dk, dv = differentiate(
                backward, dout, q, k, v, out, lse, low, None, ctx.group, ctx.layout,
                mask=mask, meter=ctx.meter,
            )  # fmt: skip
            del q, k, v
            # 3. Through the projections.
            need = ctx.needs_input_grad
            dx, dw_q = project_backward(dq, x, w_q, ctx.dtype, need[0], need[2])
            dy_k, dw_k = project_backward(dk, y, w_k, ctx.dtype, need[1], need[3])
            dy, dw_v = project_backward(dv, y, w_v, ctx.dtype, need[1], need[4], onto=dy_k)
            db = [
                d.sum(dim=(0, 2)).to(b.dtype) if b is not None and wanted else None
                for d, b, wanted in zip((dq, dk, dv), biases, need[5:8], strict=True)
            ]
        return dx, dy, dw_q, dw_k, dw_v, *db, None, None, None, None


def project(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project features (B, s, E) by a weight (E, H, D) to heads (B, H, s, D)."""
    _, H, D = weight.shape
    flat_bias = None if bias is None else bias.flatten()
    heads = torch.nn.functional.linear(features, _matrix(weight), flat_bias)
    return heads.unflatten(2, (H, D)).transpose(1, 2)


def project_backward(
    dheads: Tensor,
    features: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None,
    features_wanted: bool,
    weight_wanted: bool,
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of features (B, s, E) and weight (E, H, D), given those of the heads.

    Each in the dtype of what it belongs to, and None unless it is wanted; `dtype` is the one in
    which the forward computed, if autocast chose it.  That of the features is added to `onto`, in
    place, where that is given.
    """
    dfeatures = dweight = None
    flat = dheads.transpose(1, 2).flatten(2)
    if features_wanted:
        matrix = cast(_matrix(weight), dtype)
        if onto is None:
            dfeatures = (flat @ matrix).to(features.dtype)
        elif onto.dtype == flat.dtype:
            # The product adds as it goes: a pass over features fewer, and no room for them.
            onto.flatten(0, 1).addmm_(flat.flatten(0, 1), matrix)
            dfeatures = onto
        else:
            dfeatures = onto.add_(flat @ matrix)
    if weight_wanted:
        matrix = flat.flatten(0, 1).T @ cast(features, dtype).flatten(0, 1)
        dweight = matrix.to(weight.dtype).unflatten(0, weight.shape[1:]).permute(2, 0, 1)
    return dfeatures, dweight


def _heads(
    dtype: torch.dtype | None,
    x: Tensor,
    y: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, the same bits in forward and backward."""
    x, y = cast(x, dtype), cast(y, dtype)

    def heads(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return project(features, cast(weight, dtype), None if bias is None else cast(bias, dtype))

    return heads(x, w_q, b_q), heads(y, w_k, b_k), heads(y, w_v, b_v)


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight (E, H, D) as the matrix (H D, E) of a linear layer; a view of it."""
    return weight.permute(1, 2, 0).flatten(0, 1)
