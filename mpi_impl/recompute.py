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

from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from lvxattn.mpi_impl.cross_attention import cross_attention, cross_attention_backward
from lvxattn.mpi_impl.device import array_module
from lvxattn.reference.layout import Layout
from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.reference.validation import accumulator, check_features, dtype_name

Array = Any  # NumPy or CuPy


@dataclass(frozen=True)
class Saved:
    """All that a layer keeps from its forward for its backward: no keys, no values."""

    x: Array
    y: Array
    out: Array
    lse: Array


def cross_attention_layer(
    x: Array,
    y: Array,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    comm: MPI.Intracomm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: Array | MaskRule | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Saved]:
    """Project text and visual features, and attend from the one to the other.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    x : (B, s_q, E)
        This rank's text features; all of them where queries are replicated.
    y : (B, s_kv, E_V)
        This rank's visual features.
    w_q : (E, H, D)
    w_k : (E_V, H_KV, D)
    w_v : (E_V, H_KV, D_V)
        Weights, equal on all ranks.
    comm, schedule, scale, mask, queries, layout, meter
        As in `cross_attention`.

    Returns
    -------
    out : (B, H, s_q, D_V)
    saved : Saved
        For `cross_attention_layer_backward`.

    Raises
    ------
    ValueError, TypeError
        As `cross_attention`, for x, y and the weights too.
    """
    check_features(x, y, w_q, w_k, w_v, comm, together=layout is None)
    q, k, v = project(x, w_q), project(y, w_k), project(y, w_v)
    out, lse = cross_attention(
        q, k, v, comm,
        schedule=schedule, scale=scale, mask=mask, queries=queries, layout=layout, meter=meter,
    )  # fmt: skip
    return out, Saved(x, y, out, lse)


def cross_attention_layer_backward(
    dout: Array,
    saved: Saved,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    comm: MPI.Intracomm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: Array | MaskRule | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Differentiate `cross_attention_layer`, making keys and values again.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
    saved : Saved
        From the forward.
    w_q, w_k, w_v, comm, schedule, scale, mask, queries, layout, meter
        As given to it.

    Returns
    -------
    dx : (B, s_q, E)
    dy : (B, s_kv, E_V)
    dw_q, dw_k, dw_v : shaped as the weights
        This rank's partial sums, in the accumulator dtype: add them up over the ranks in that.
        Where queries are replicated, dw_q is whole on every rank.
    """
    x, y = saved.x, saved.y
    # 1. Make again what was forgotten.
    q, k, v = project(x, w_q), project(y, w_k), project(y, w_v)
    # 2. Through the attention.
    dq, dk, dv = cross_attention_backward(
        dout, q, k, v, saved.out, saved.lse, comm,
        schedule=schedule, scale=scale, mask=mask, queries=queries, layout=layout, meter=meter,
    )  # fmt: skip
    # 3. Through the projections.
    dx, dw_q = project_backward(dq, x, w_q)
    dy_k, dw_k = project_backward(dk, y, w_k)
    dy_v, dw_v = project_backward(dv, y, w_v)
    dx, dy = (d.astype(x.dtype, copy=False) for d in (dx, dy_k + dy_v))
    return dx, dy, dw_q, dw_k, dw_v


def project(features: Array, weight: Array) -> Array:
    """Project features (B, s, E) by a weight (E, H, D) to heads (B, H, s, D)."""
    xp, dtype = array_module(features), features.dtype
    features, weight = widen(features), widen(weight)
    return xp.moveaxis(xp.tensordot(features, weight, axes=1), 1, 2).astype(dtype, copy=False)


def project_backward(dheads: Array, features: Array, weight: Array) -> tuple[Array, Array]:
    """Return the gradients of features (B, s, E) and weight (E, H, D), given those of the heads.

    Both are in the accumulator dtype: what follows adds them to others.
    """
    xp = array_module(features)
    dheads, features, weight = widen(dheads), widen(features), widen(weight)
    dfeatures = xp.tensordot(dheads, weight, axes=((1, 3), (1, 2)))
    dweight = xp.tensordot(features, dheads, axes=((0, 1), (0, 2)))
    return dfeatures, dweight


def widen(x: Array) -> Array:
    """Return x in the dtype in which its sums are taken."""
    return x.astype(accumulator(dtype_name(x)), copy=False)
