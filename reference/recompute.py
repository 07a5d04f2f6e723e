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

import numpy as np
import numpy.typing as npt

from lvxattn.reference.cross_attention import cross_attention, cross_attention_backward
from lvxattn.reference.layout import Layout
from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.reference.validation import check_features
from lvxattn.reference.virtual_ranks import VirtualComm

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Saved:
    """All that a layer keeps from its forward for its backward: no keys, no values."""

    x: AnyArray
    y: AnyArray
    out: Array
    lse: Array


def cross_attention_layer(
    x: AnyArray,
    y: AnyArray,
    w_q: AnyArray,
    w_k: AnyArray,
    w_v: AnyArray,
    comm: VirtualComm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
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
    dout: AnyArray,
    saved: Saved,
    w_q: AnyArray,
    w_k: AnyArray,
    w_v: AnyArray,
    comm: VirtualComm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
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
        This rank's partial sums; where queries are replicated, dw_q is whole on every rank.
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
    return dx, dy_k + dy_v, dw_q, dw_k, dw_v


def project(features: AnyArray, weight: AnyArray) -> Array:
    """Project features (B, s, E) by a weight (E, H, D) to heads (B, H, s, D)."""
    features, weight = features.astype(np.float64), weight.astype(np.float64)
    return np.moveaxis(np.tensordot(features, weight, axes=1), 1, 2)


def project_backward(dheads: Array, features: AnyArray, weight: AnyArray) -> tuple[Array, Array]:
    """Return the gradients of features (B, s, E) and weight (E, H, D), given those of the heads."""
    features, weight = features.astype(np.float64), weight.astype(np.float64)
    dfeatures = np.tensordot(dheads, weight, axes=((1, 3), (1, 2)))
    dweight = np.tensordot(features, dheads, axes=((0, 1), (0, 2)))
    return dfeatures, dweight
