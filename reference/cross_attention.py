"""Exact cross-attention over keys and values that are spread over ranks: the front door.

Both functions agree on a layout, unless they are given one, and hand over to the schedule, whose
partial result, over all keys, is out and lse.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.validation import check_numpy
from lvxattn.plan.choose import Layout

from .block_attention import delta_of
from .exchange import Exchange
from .gather import gather, gather_backward
from .lv_xattn import lv_xattn, lv_xattn_backward
from .merge import lse_of, remainder_of
from .replicated import replicated, replicated_backward
from .ring_attention import ring_attention, ring_attention_backward
from .ulysses import ulysses, ulysses_backward
from .virtual_ranks import VirtualComm

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]
# Up to this size lse alone will do for a backward.
LARGE_LSE = 256.0

Forward = Callable[..., tuple[Array, Array, Array]]
Backward = Callable[..., tuple[Array, Array, Array]]

FORWARD = {"lv-xattn": lv_xattn, "ring": ring_attention, "ulysses": ulysses, "gather": gather}
BACKWARD = {
    "lv-xattn": lv_xattn_backward,
    "ring": ring_attention_backward,
    "ulysses": ulysses_backward,
    "gather": gather_backward,
}


def cross_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    comm: VirtualComm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    q : (B, H, s_q, D)
        This rank's queries.
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
        This rank's keys and values; H is a multiple of H_KV, and head h reads group
        ``h // (H // H_KV)``.  Lengths may differ between ranks and may be 0.
    comm : VirtualComm
    schedule : str
        What travels: ``"lv-xattn"``, the queries, round a ring; ``"gather"``, the queries, all at
        once; ``"ring"``, the keys and values, round a ring; ``"ulysses"``, everything, so that each
        rank has all lengths of a share of the heads (P must divide H_KV); ``"auto"``, whichever
        sends the fewest bytes.  Ignored where `layout` is given, or queries are replicated.
    scale : float, optional
        ``1 / sqrt(D)`` unless given.
    mask : array or callable, optional
        What this rank's keys look like to every query: bool (True = may attend) or additive float,
        broadcastable to (B, H, S_Q, s_kv), its query axis 1 or all ranks' queries in rank order,
        its last axis exactly this rank's keys; or ``mask(b, h, q_index, kv_index) -> bool`` on
        broadcastable arrays of global indices.  With ``"ring"`` and ``"ulysses"`` a callable is
        asked about the keys of all ranks, so that it must be the same rule on every rank.  What is
        hidden must be finite all the same: 0 times NaN is NaN.
    queries : str
        ``"sharded"``, or ``"replicated"``: every rank holds all queries, the same ones, and gets
        out for all of them.
    layout : Layout, optional
        From `Layout.agree`, to agree once for many calls.
    meter : Meter, optional
        Is added to: messages, bytes, seconds.

    Returns
    -------
    out : (B, H, s_q, D_V), float64
    lse : (B, H, s_q), float64
        Natural log; -inf, with out = 0, where a query may attend to nothing.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected, what was given and the rank; on every rank alike,
        before anything is sent, unless `layout` is given: then on the rank that misfits.
    """
    if layout is None:
        layout = Layout.agree(
            q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries,
            check=lambda: check_numpy(q),
        )  # fmt: skip
    else:
        check_numpy(q)
        layout.check(q, k, v, comm, scale=scale, mask=mask, queries=queries)
    forward, _ = passes(layout)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    exchange = Exchange(comm, layout, mask, meter)
    out, top, total = forward(q, k, v, exchange)
    exchange.finish()
    return out, lse_of(top, total)


def cross_attention_backward(
    dout: AnyArray,
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    out: AnyArray,
    lse: AnyArray,
    comm: VirtualComm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
    dlse: AnyArray | None = None,
    queries: str = "sharded",
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Differentiate `cross_attention`.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
        Gradient of the loss with respect to this rank's out.
    q, k, v, comm, schedule, scale, mask, queries, layout, meter
        As given to `cross_attention`.
    out, lse
        As returned by it.  Where any rank's lse is large, as that of a row hidden by -1e9, which
        has lost how many keys there were, the forward is run once more, with its messages.
    dlse : (B, H, s_q), optional
        Gradient of the loss with respect to lse, where lse is used too.

    Returns
    -------
    dq : (B, H, s_q, D), float64
    dk : (B, H_KV, s_kv, D), float64
    dv : (B, H_KV, s_kv, D_V), float64
        Summed over the queries of all ranks.

    Raises
    ------
    ValueError, TypeError
        As `cross_attention`.
    """
    backward = dout, out, lse, dlse
    if layout is None:
        layout = Layout.agree(
            q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries,
            backward=backward, check=lambda: check_numpy(q),
        )  # fmt: skip
    else:
        check_numpy(q)
        layout.check(q, k, v, comm, scale=scale, mask=mask, queries=queries, backward=backward)
    forward, backward_pass = passes(layout)
    dout, q, k, v, out, lse = (x.astype(np.float64) for x in (dout, q, k, v, out, lse))
    low = None
    # Where lse is large, as in a row hidden by -1e9, it cannot say how many keys a row saw: the
    # forward can.
    if any(comm.allgather(_too_large(lse))):
        exchange = Exchange(comm, layout, mask, meter)
        _, top, total = forward(q, k, v, exchange)
        exchange.finish()
        low = remainder_of(lse, top, total)
    dout, delta = delta_of(dout, out, lse, low, dlse)
    exchange = Exchange(comm, layout, mask, meter)
    dq, dk, dv = backward_pass(dout, q, k, v, lse, delta, exchange)
    exchange.finish()
    return dq, dk, dv


def passes(layout: Layout) -> tuple[Forward, Backward]:
    """Return forward and backward of what the layout says."""
    if layout.queries == "replicated":
        return replicated, replicated_backward
    return FORWARD[layout.schedule], BACKWARD[layout.schedule]


def _too_large(lse: Array) -> bool:
    """Return whether the rounding of an lse in fp32, 1.5e-5 of p at 256, would show."""
    return bool(((abs(lse) > LARGE_LSE) & (lse != -np.inf)).any())
