r"""Checkpointing: a cross-attention layer that recomputes keys and values in its backward.

    k, v = make_kv(y)     out, lse = cross_attention(q, k, v)

All cross-attention layers of a model read the same visual features y.  A layer that saves q, y, out
and lse saves y once for the whole model; keys and values would be saved for every layer.  The
backward calls make_kv again.  Where that projects y, this costs two matrix products, and gradients
follow from dk and dv by

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
    """Arrays that a layer's forward saves for its backward: neither keys nor values.

    Attributes
    ----------
    q, y, out, lse : array
    forms : tuple
        Shapes and dtypes of k and v, which must be the same when recomputed.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import cross_attention_layer, run_ranks
    >>> q, kv = np.ones((1, 2, 3, 8)), np.ones((1, 2, 50, 8))
    >>> out, saved = run_ranks(
    ...     1, lambda comm: cross_attention_layer(q, kv, lambda y: (y, y), comm)
    ... )[0]
    >>> saved.y is kv, saved.out is out
    (True, True)
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
    keys: str = "sharded",
    grid: tuple[int, int] | None = None,
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Saved]:
    """Compute keys and values from visual features, attend to them, and do not save them.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    q : (B, H, s_q, D)
        This rank's queries; all of them where queries are replicated.
    y : (B, s_kv, E_V)
        This rank's visual features, or any other argument of `make_kv`.
    make_kv : callable
        ``make_kv(y) -> (k, v)``, of shapes (B, H_KV, s_kv, D) and (B, H_KV, s_kv, D_V), such as
        ``lambda y: (project(y, w_k), project(y, w_v))``.  The backward calls it again, and it must
        return the same.
    comm, schedule, scale, mask, queries, keys, grid, layout, meter
        As in `cross_attention`.

    Returns
    -------
    out : (B, H, s_q, D_V)
    saved : Saved
        For `cross_attention_layer_backward`.

    Raises
    ------
    ValueError, TypeError
        As `cross_attention`, and for the return value of make_kv.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import cross_attention_layer, run_ranks
    >>> q, y = np.ones((1, 2, 3, 8)), np.ones((1, 50, 16))  # on each of 2 ranks
    >>> def make_kv(y):  # in a model a projection
    ...     heads = y.reshape(1, 50, 2, 8).swapaxes(1, 2)
    ...     return heads, heads
    >>> results = run_ranks(2, lambda comm: cross_attention_layer(q, y, make_kv, comm))
    >>> [out.shape for out, saved in results]
    [(1, 2, 3, 8), (1, 2, 3, 8)]
    """
    # 1. Compute keys and values.
    k, v = _keys_and_values(make_kv, y, q, comm, layout)
    # 2. Attend to them; they are freed at the end of this call.
    out, lse = cross_attention(
        q, k, v, comm,
        schedule=schedule, scale=scale, mask=mask, queries=queries, keys=keys, grid=grid,
        layout=layout, meter=meter,
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
    keys: str = "sharded",
    grid: tuple[int, int] | None = None,
    gradients: str | None = None,
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Any, Any, Any]:
    """Differentiate `cross_attention_layer`, recomputing keys and values.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
    saved : Saved
        Returned by the forward.
    make_kv, comm, schedule, scale, mask, queries, keys, grid, layout, meter
        As given to the forward.
    gradients : str, optional
        As given to `cross_attention_backward`.

    Returns
    -------
    dq : (B, H, s_q, D)
    dk : (B, H_KV, s_kv, D)
    dv : (B, H_KV, s_kv, D_V)
        The caller differentiates make_kv, given dk and dv, as by `project_backward`.

    Raises
    ------
    ValueError, TypeError
        As `cross_attention_backward`, and where make_kv returns other shapes or dtypes than in the
        forward.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import (
    ...     cross_attention_layer, cross_attention_layer_backward, run_ranks
    ... )
    >>> q, y = np.ones((1, 2, 3, 8)), np.ones((1, 50, 16))  # on each of 2 ranks
    >>> def make_kv(y):
    ...     heads = y.reshape(1, 50, 2, 8).swapaxes(1, 2)
    ...     return heads, heads
    >>> def differentiate(comm):
    ...     out, saved = cross_attention_layer(q, y, make_kv, comm)
    ...     return cross_attention_layer_backward(np.ones_like(out), saved, make_kv, comm)
    >>> [dv.shape for dq, dk, dv in run_ranks(2, differentiate)]
    [(1, 2, 50, 8), (1, 2, 50, 8)]
    """
    q, y = saved.q, saved.y
    # 3. Recompute them, and differentiate the attention.
    k, v = _keys_and_values(make_kv, y, q, comm, layout, saved.forms)
    return cross_attention_backward(
        dout, q, k, v, saved.out, saved.lse, comm,
        schedule=schedule, scale=scale, mask=mask, queries=queries, keys=keys, grid=grid,
        gradients=gradients, layout=layout, meter=meter,
    )  # fmt: skip


def _keys_and_values(
    make_kv: MakeKV,
    y: Any,
    q: AnyArray,
    comm: VirtualComm,
    layout: Layout | None,
    before: Forms | None = None,
) -> tuple[Array, Array]:
    """Return ``make_kv(y)``, checked; collective unless a layout is given.

    In a backward its shapes and dtypes must be those of `before`.
    """

    def check() -> None:
        check_made(make_kv, made, q, before, also=lambda q, *_: check_numpy(q))

    together = layout is None
    made = attempt(lambda: make_kv(y) if callable(make_kv) else None, comm, together=together)
    check_here_or_together(check, comm, together=together)
    k, v = made
    return k, v


def project(features: AnyArray, weight: AnyArray) -> Array:
    """Project features (B, s, E) to heads (B, H, s, D) by a weight (E, H, D)."""
    features, weight = features.astype(np.float64), weight.astype(np.float64)
    heads = np.tensordot(features, weight, axes=1)  # (B, s, H, D)
    return np.moveaxis(heads, 1, 2)  # (B, H, s, D)


def project_backward(dheads: Array, features: AnyArray, weight: AnyArray) -> tuple[Array, Array]:
    """Return the gradients of features (B, s, E) and weight (E, H, D), given those of the heads."""
    features, weight = features.astype(np.float64), weight.astype(np.float64)
    dfeatures = np.tensordot(dheads, weight, axes=((1, 3), (1, 2)))  # (B, s, E)
    dweight = np.tensordot(features, dheads, axes=((0, 1), (0, 2)))  # (E, H, D)
    return dfeatures, dweight
