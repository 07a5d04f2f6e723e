"""Exact cross-attention over keys and values that are sharded over ranks: the front door.

In both functions the ranks agree on a layout, unless one is given, and call the schedule.  A
schedule's forward returns (out, top, total), merged over all keys, and `lse_of` computes lse from
the last two.
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
from .grid import grid as grid_attention
from .grid import grid_backward
from .lv_xattn import lv_xattn, lv_xattn_backward
from .merge import lse_of, lse_remainder_of
from .replicated import (
    replicated_keys,
    replicated_keys_backward,
    replicated_queries,
    replicated_queries_backward,
)
from .ring_attention import ring_attention, ring_attention_backward
from .ulysses import ulysses, ulysses_backward
from .virtual_ranks import VirtualComm

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]
# Above this |lse|, the backward reruns the forward.
LARGE_LSE = 256.0

Schedule = Callable[..., tuple[Array, Array, Array]]

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
    keys: str = "sharded",
    grid: tuple[int, int] | None = None,
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
        once; ``"ring"``, the keys and values, round a ring; ``"grid"``, the queries along columns
        of ranks, the keys along rows; ``"ulysses"``, everything, so that each rank has all rows of
        a share of the heads (P must divide H_KV); ``"auto"``, the one of these that sends the
        fewest bytes.  Ignored where `layout` is given, or queries or keys are replicated.
    scale : float, optional
        Default: ``1 / sqrt(D)``.
    mask : array or callable, optional
        The mask of this rank's keys over all queries: bool (True = may attend) or additive float,
        broadcastable to (B, H, S_Q, s_kv).  Axis 2 has length 1 or S_Q, the queries of all ranks in
        rank order; the last axis has exactly s_kv.  Or ``mask(b, h, q_index, kv_index) -> bool`` on
        broadcastable arrays of global indices; with schedules by which keys travel it is
        called on the keys of other ranks, and must be the same on every rank.  Hidden keys and
        values must be finite too: 0 times NaN is NaN.
    queries : str
        ``"sharded"``, or ``"replicated"``: every rank passes the same queries, all of them, and
        gets out for all of them.
    keys : str
        ``"sharded"``, or ``"replicated"``: every rank passes the same keys and values, all of them,
        to which its own queries attend; their gradients are complete on every rank.  For few keys
        and very many queries.
    grid : (int, int), optional
        With ``"grid"``, the numbers of ranks that queries, and that keys, move among; their product
        is P.  Default: the one that sends the fewest bytes.  Ignored where `layout` is given.
    layout : Layout, optional
        From `Layout.agree`, to agree once for many calls.
    meter : Meter, optional
        Adds up messages, bytes and seconds.

    Returns
    -------
    out : (B, H, s_q, D_V), float64
    lse : (B, H, s_q), float64
        Natural log of the sum of exponentiated scores; -inf, with out = 0, where a query may attend
        to no key.

    Raises
    ------
    ValueError, TypeError
        The message names the argument, what was expected, what was given and the rank.  Raised on
        every rank alike before anything is sent or, where `layout` is given, on the rank whose
        arguments do not fit it.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import cross_attention, full_attention, run_ranks, shard, unshard
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 2, length, 8)) for length in (6, 50, 50))
    >>> def attend(comm):
    ...     out, lse = cross_attention(shard(q, comm), shard(k, comm), shard(v, comm), comm)
    ...     return unshard(out, comm)
    >>> out, lse = full_attention(q, k, v)
    >>> all(np.allclose(found, out) for found in run_ranks(4, attend))
    True
    """
    if layout is None:
        layout = Layout.agree(
            q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries, keys=keys,
            grid=grid,
            check=lambda: check_numpy(q),  # called there, so that all ranks raise its error
        )  # fmt: skip
    else:
        check_numpy(q)
        layout.check(q, k, v, comm, scale=scale, mask=mask, queries=queries, keys=keys)
    forward, _ = SCHEDULE_FUNCTIONS[layout.way]
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
    keys: str = "sharded",
    grid: tuple[int, int] | None = None,
    gradients: str | None = None,
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Any, Any, Any]:
    """Differentiate `cross_attention`.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
        Gradient of the loss with respect to this rank's out.
    q, k, v, comm, schedule, scale, mask, queries, keys, grid, layout, meter
        As given to `cross_attention`.
    out, lse
        As returned by it.
    dlse : (B, H, s_q), optional
        Gradient of the loss with respect to lse; default: 0.
    gradients : str, optional
        The arguments whose gradients are computed, and sent: ``"qkv"``, ``"q"`` or ``"kv"``.  Where
        ranks differ, those that any rank wants.  Default: those of `layout`, or ``"qkv"``.

    Returns
    -------
    dq : (B, H, s_q, D), float64
    dk : (B, H_KV, s_kv, D), float64
    dv : (B, H_KV, s_kv, D_V), float64
        Summed over the queries of all ranks.  None for gradients that are not computed.

    Raises
    ------
    ValueError, TypeError
        As `cross_attention`.

    Notes
    -----
    In a row that a mask of -1e9 hides, lse is about -1e9.  In float32, which the other
    implementations use, its rounding loses the log of the number of keys.  Where any rank has an
    ``|lse|`` above `LARGE_LSE`, the forward is therefore rerun, with its messages, to compute what
    the rounding lost.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import cross_attention, cross_attention_backward, run_ranks, shard
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 2, length, 8)) for length in (6, 50, 50))
    >>> def differentiate(comm):
    ...     args = [shard(x, comm) for x in (q, k, v)]
    ...     out, lse = cross_attention(*args, comm)
    ...     return cross_attention_backward(np.ones_like(out), *args, out, lse, comm)
    >>> [dk.shape for dq, dk, dv in run_ranks(4, differentiate)]
    [(1, 2, 13, 8), (1, 2, 13, 8), (1, 2, 12, 8), (1, 2, 12, 8)]
    """
    results = dout, out, lse, dlse
    if layout is None:
        layout = Layout.agree(
            q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries, keys=keys,
            grid=grid, gradients="qkv" if gradients is None else gradients, backward=results,
            check=lambda: check_numpy(q),
        )  # fmt: skip
    else:
        check_numpy(q)
        layout.check(
            q, k, v, comm, scale=scale, mask=mask, queries=queries, keys=keys,
            gradients=gradients, backward=results,
        )  # fmt: skip
    forward, backward = SCHEDULE_FUNCTIONS[layout.way]
    dout, q, k, v, out, lse = (x.astype(np.float64) for x in (dout, q, k, v, out, lse))
    lse_remainder = None
    if any(comm.allgather(_too_large(lse))):
        exchange = Exchange(comm, layout, mask, meter)
        _, top, total = forward(q, k, v, exchange)
        exchange.finish()
        lse_remainder = lse_remainder_of(lse, top, total)
    dout, delta = delta_of(dout, out, lse, lse_remainder, dlse)
    exchange = Exchange(comm, layout, mask, meter)
    computed = backward(dout, q, k, v, lse, delta, exchange)
    exchange.finish()
    dq, dk, dv = (
        x if name in layout.gradients else None for name, x in zip("qkv", computed, strict=True)
    )
    return dq, dk, dv


def _too_large(lse: Array) -> bool:
    """Return whether rounding any |lse| to fp32 matters: at 256 it changes p by 1.5e-5."""
    return bool(((abs(lse) > LARGE_LSE) & (lse != -np.inf)).any())
