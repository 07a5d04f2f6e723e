"""Exact cross-attention over keys and values that are sharded over ranks: the front door.

In both functions the ranks agree on a layout, unless one is given, and call the schedule.  A
schedule's forward returns (out, top, total), merged over all keys, and `lse_of` computes lse from
the last two.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.pool import Pool
from lvxattn.common.validation import instead_of
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
from .transport.death_notice import announce_under_hydra, named
from .transport.device import check_arrays, computing
from .transport.watchdog import any_rank, watching
from .ulysses import ulysses, ulysses_backward

Array = Any  # NumPy or CuPy
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
    q: Array,
    k: Array,
    v: Array,
    comm: MPI.Intracomm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: Array | MaskRule | None = None,
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
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
        This rank's queries, keys and values, NumPy's or CuPy's.
    comm : MPI.Intracomm
        Messages use tags 7001, 7002 and 7004 of it.
    schedule, scale, mask, queries, keys, grid, layout, meter
        As in `lvxattn.reference.cross_attention`.

    Returns
    -------
    out : (B, H, s_q, D_V), q's dtype
    lse : (B, H, s_q), float32, or float64 where q is
        Natural log; -inf, with out = 0, where a query may attend to no key.

    Raises
    ------
    ValueError, TypeError
        As `lvxattn.reference.cross_attention`.

    Notes
    -----
    Any error raised later, as by a callable mask, leaves messages pending: end the program, as
    ``python -m mpi4py`` does, or at least use another communicator.

    Examples
    --------
    Here with one rank; ``mpiexec -n 4 python -m mpi4py program.py`` runs the same on four.

    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from lvxattn.mpi_impl import cross_attention
    >>> q, k, v = (np.ones((1, 2, s, 8), np.float32) for s in (6, 50, 50))  # this rank's
    >>> out, lse = cross_attention(q, k, v, MPI.COMM_WORLD)
    >>> out.shape, out.dtype, lse.shape
    ((1, 2, 6, 8), dtype('float32'), (1, 2, 6))
    """
    check_comm(comm)
    announce_under_hydra()
    if layout is None:
        with watching(comm, "all ranks to agree on a layout"):
            layout = Layout.agree(
                q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries,
                keys=keys, grid=grid,
                check=lambda: check_arrays(q),  # called there, so that all ranks raise its error
            )  # fmt: skip
        layout = replace(layout, pool=Pool(keeps=False))  # for this call only
    else:
        layout.check(q, k, v, comm, scale=scale, mask=mask, queries=queries, keys=keys)
    forward, _ = SCHEDULE_FUNCTIONS[layout.way]
    with named(comm), computing(q):
        exchange = Exchange(comm, layout, q, mask, meter)
        out, top, total = forward(q, k, v, exchange)
        exchange.finish()
        return out.astype(q.dtype, copy=False), lse_of(top, total)


def cross_attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    comm: MPI.Intracomm,
    *,
    schedule: str = "lv-xattn",
    scale: float | None = None,
    mask: Array | MaskRule | None = None,
    dlse: Array | None = None,
    queries: str = "sharded",
    keys: str = "sharded",
    grid: tuple[int, int] | None = None,
    gradients: str | None = None,
    layout: Layout | None = None,
    meter: Meter | None = None,
) -> tuple[Any, Any, Any]:
    """Differentiate `cross_attention`.

    Collective: every rank of comm calls this.  The backwards of several calls must come in the same
    order on all ranks; this is not checked.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
        Gradient of the loss with respect to this rank's out; cast to q's dtype.
    q, k, v, comm, schedule, scale, mask, queries, keys, grid, layout, meter
        As given to `cross_attention`.
    out, lse
        As returned by it.
    dlse : (B, H, s_q), optional
        Gradient of the loss with respect to lse; default: 0.
    gradients : str, optional
        As given to `lvxattn.reference.cross_attention_backward`.

    Returns
    -------
    dq : (B, H, s_q, D)
    dk : (B, H_KV, s_kv, D)
    dv : (B, H_KV, s_kv, D_V)
        In q's dtype, summed over the queries of all ranks in float32, or float64 where q is.  None
        for gradients that are not computed.

    Raises
    ------
    ValueError, TypeError
        As `cross_attention`.

    Notes
    -----
    Where any rank has an ``|lse|`` above `LARGE_LSE`, the forward is rerun: see
    `lvxattn.reference.cross_attention_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from lvxattn.mpi_impl import cross_attention, cross_attention_backward
    >>> args = [np.ones((1, 2, s, 8), np.float32) for s in (6, 50, 50)]
    >>> out, lse = cross_attention(*args, MPI.COMM_WORLD)
    >>> dq, dk, dv = cross_attention_backward(
    ...     np.ones_like(out), *args, out, lse, MPI.COMM_WORLD
    ... )
    >>> dv.shape, bool(np.isclose(dv.sum(), out.size))  # each row of weights sums to 1
    ((1, 2, 50, 8), True)
    """
    results = dout, out, lse, dlse
    check_comm(comm)
    announce_under_hydra()
    if layout is None:
        with watching(comm, "all ranks to agree on a layout"):
            layout = Layout.agree(
                q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries,
                keys=keys, grid=grid, gradients="qkv" if gradients is None else gradients,
                backward=results,
                check=lambda: check_arrays(q),
            )  # fmt: skip
        layout = replace(layout, pool=Pool(keeps=False))  # for this call only
    else:
        layout.check(
            q, k, v, comm, scale=scale, mask=mask, queries=queries, keys=keys,
            gradients=gradients, backward=results,
        )  # fmt: skip
    forward, backward = SCHEDULE_FUNCTIONS[layout.way]
    with named(comm), computing(q):
        dout = dout.astype(q.dtype, copy=False)  # as on the ranks that it visits
        lse_remainder = None
        if any_rank(comm, _too_large(lse), "all ranks to check lse"):
            exchange = Exchange(comm, layout, q, mask, meter)
            _, top, total = forward(q, k, v, exchange)
            exchange.finish()
            lse_remainder = lse_remainder_of(lse, top, total)
        dout, delta = delta_of(dout, out, lse, lse_remainder, dlse)
        exchange = Exchange(comm, layout, q, mask, meter)
        computed = backward(dout, q, k, v, lse, delta, exchange)
        exchange.finish()
        dq, dk, dv = (
            x.astype(q.dtype, copy=False) if name in layout.gradients else None
            for name, x in zip("qkv", computed, strict=True)
        )
        return dq, dk, dv


def check_comm(comm: MPI.Intracomm) -> None:
    """Check that comm is an intracommunicator.

    Raises
    ------
    TypeError
        On this rank only: no other rank can be reached over such a communicator.
    """
    if not hasattr(comm, "Isend"):
        raise TypeError(f"comm: expected an MPI.Intracomm, got {instead_of(comm)}")
    if isinstance(comm, MPI.Comm) and (comm == MPI.COMM_NULL or comm.Is_inter()):
        kind = "COMM_NULL" if comm == MPI.COMM_NULL else "an intercommunicator"
        raise TypeError(f"comm: expected an MPI.Intracomm, got {kind}")


def _too_large(lse: Array) -> bool:
    """Return whether rounding any |lse| to fp32 matters: at 256 it changes p by 1.5e-5."""
    return bool(((abs(lse) > LARGE_LSE) & (lse != -np.inf)).any())
