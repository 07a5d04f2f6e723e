r"""A cross-attention layer that forgets its keys and values, and makes them again in the backward.

    k, v = make_kv(y)     out, lse = cross_attention(q, k, v)

All cross-attention layers of a model read the same visual features y, so a layer that keeps only
q, y, out and lse keeps y once for the whole model, where keys and values would be kept for every
layer.  The backward calls make_kv again, whatever that does.  Where it projects, that costs two
matrix products, and gradients go on from dk and dv as

    k = y W_k     v = y W_v     dy = dk W_k^T + dv W_v^T     dW_k = y^T dk     dW_v = y^T dv

Gradients of the weights are this rank's partial sums: add them up over the ranks, once a step.

Source: arXiv:2502.02406, section 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.validation import (
    Forms,
    attempt,
    check_here_or_together,
    check_made,
    check_numpy,
    forms,
)
from lvxattn.plan.choose import Layout

from .cross_attention import cross_attention, cross_attention_backward
from .virtual_ranks import VirtualComm

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]
MakeKV = Callable[[Any], tuple[AnyArray, AnyArray]]


@dataclass(frozen=True)
class Saved:
    """All that a layer keeps from its forward for its backward: no keys, no values.

    Attributes
    ----------
    q, y, out, lse : array
    forms : tuple
        The shapes and dtypes of k and v, as they have to come again.
    """

    q: AnyArray
    y: Any
    out: Array
    lse: Array
    forms: Forms


def cross_attention_layer(
    q: AnyArray,
    y: Any,
    make_kv: MakeKV,
    comm: VirtualComm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Saved]:
    """Make keys and values of visual features, attend to them, and forget them.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    q : (B, H, s_q, D)
        This rank's queries; all of them where queries are replicated.
    y : (B, s_kv, E_V)
        This rank's visual features, or whatever else `make_kv` takes.
    make_kv : callable
        ``make_kv(y) -> (k, v)``, of shapes (B, H_KV, s_kv, D) and (B, H_KV, s_kv, D_V), such as
        ``lambda y: (project(y, w_k), project(y, w_v))``.  The backward calls it again, and it has
        to make the same.
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
        As `cross_attention`, for make_kv too.
    """
    # 1. Make keys and values.
    k, v = _keys_and_values(make_kv, y, q, comm, layout)
    # 2. Attend to them; with the end of this call they are forgotten.
    out, lse = cross_attention(
        q, k, v, comm,
        schedule=schedule, scale=scale, mask=mask, queries=queries, layout=layout, meter=meter,
    )  # fmt: skip
    return out, Saved(q, y, out, lse, forms((k, v)))


def cross_attention_layer_backward(
    dout: AnyArray,
    saved: Saved,
    make_kv: MakeKV,
    comm: VirtualComm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Differentiate `cross_attention_layer`, making keys and values again.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
    saved : Saved
        From the forward.
    make_kv, comm, schedule, scale, mask, queries, layout, meter
        As given to it.

    Returns
    -------
    dq : (B, H, s_q, D)
    dk : (B, H_KV, s_kv, D)
    dv : (B, H_KV, s_kv, D_V)
        From dk and dv the caller goes back through make_kv, as by `project_backward`.

    Raises
    ------
    ValueError, TypeError
        As `cross_attention_backward`, and where make_kv makes others than in the forward.
    """
    q, y = saved.q, saved.y
    # 3. Make again what was forgotten, and go back through the attention.
    k, v = _keys_and_values(make_kv, y, q, comm, layout, saved.forms)
    return cross_attention_backward(
        dout, q, k, v, saved.out, saved.lse, comm,
        schedule=schedule, scale=scale, mask=mask, queries=queries, layout=layout, meter=meter,
    )  # fmt: skip


def _keys_and_values(
    make_kv: MakeKV,
    y: Any,
    q: AnyArray,
    comm: VirtualComm,
    layout: Layout | None,
    before: Forms | None = None,
) -> tuple[Array, Array]:
    """Return what `make_kv` makes of y, checked: on all ranks together, unless a layout is there.

    In a backward it has to be what it was `before`.
    """

    def check() -> None:
        check_made(make_kv, made, q, before, also=lambda q, *_: check_numpy(q))

    together = layout is None
    made = attempt(lambda: make_kv(y) if callable(make_kv) else None, comm, together=together)
    check_here_or_together(check, comm, together=together)
    k, v = made
    return k, v


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
