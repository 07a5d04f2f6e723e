"""Agree on the arguments of a call: the one collective check, before any block moves.

Each rank checks its own arguments, then one all-gather carries its record, or its error, to all.  A
callable mask is then called once, which takes another.  Every rank draws the same conclusion from
the same records: the error of the lowest rank that has one, or the first mismatch, or agreement.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isclose, prod, sqrt
from operator import index
from typing import Any

from lvxattn.common.free_memory import Room, free_memory
from lvxattn.common.masks import MaskView
from lvxattn.common.rules import Rule, check_sendable, same_rule
from lvxattn.common.validation import (
    Communicator,
    accumulator,
    arange,
    check_attention,
    check_backward,
    check_communicator,
    check_here_or_together,
    check_mask_shape_rows,
    device_kind,
    dtype_name,
    library,
    on_rank,
    raise_lowest,
)

Array = Any
MaskKind = tuple[tuple[int, ...], str] | None
Backward = tuple[Array, Array, Array, Array | None]

SCHEDULES = ("lv-xattn", "ring", "grid", "ulysses", "gather")
AUTO = "auto"
# How the queries, and the keys, are distributed: cut over the ranks, or whole on every rank.
SPREADS = ("sharded", "replicated")
# The arguments whose gradients are computed.
GRADIENTS = ("qkv", "q", "kv")
# A rank works on other ranks' keys: array masks travel, and callables must be the same.
MASKS_TRAVEL = ("ring", "grid", "ulysses")

# Elements of q, k and v from which it is checked that the host has room for the call.
LARGE = 2**22

# Fields of a record that must be equal on all ranks, and the argument that an error names.
EQUAL_ON_ALL_RANKS = {
    "B": "q",
    "H": "q",
    "H_KV": "k",
    "D": "q",
    "D_V": "v",
    "dtype": "q",
    "scale": "scale",
    "schedule": "schedule",
    "queries": "queries",
    "keys": "keys",
    "grid": "grid",
    "library": "q",
    "device": "q",
    "call": "call",
}
# Those of them that concern the call, not its layout.
ONLY_OF_THE_CALL = ("library", "device", "call")


@dataclass(frozen=True)
class Record:
    """The arguments of one rank, as the others need to know them."""

    host: str
    s_q: int
    s_kv: int
    mask: MaskKind
    callable_mask: bool
    structure: Rule | None
    B: int
    H: int
    H_KV: int
    D: int
    D_V: int
    dtype: str
    scale: float
    schedule: str
    queries: str
    keys: str
    gradients: str
    grid: tuple[int, int] | None
    library: str
    device: str
    call: str
    machine: Any
    clock: int
    free: Room | None


def agree_on(
    q: Array,
    k: Array,
    v: Array,
    comm: Communicator,
    *,
    schedule: str,
    scale: float | None,
    mask: Any,
    backward: Backward | None = None,
    queries: str = "sharded",
    keys: str = "sharded",
    gradients: str = "qkv",
    grid: tuple[int, int] | None = None,
    call: str = "forward",
    machine: Any = None,
    check: Callable[[], object] | None = None,
) -> list[Record]:
    """Return the records of all ranks, in rank order.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    q, k, v, comm, schedule, scale, mask, backward, queries, keys, gradients, grid, machine,
    check
        As given to `Layout.agree`.
    call : str
        Describes the call; must be equal on all ranks.

    Raises
    ------
    ValueError, TypeError
        The same on every rank.
    """
    check_communicator(comm)
    mine: Record | Exception
    try:
        if check is not None:
            check()
        check_attention(q, k, v, scale=scale, mask=mask)
        if backward is not None:
            check_backward(q, v, *backward)
        if schedule not in (*SCHEDULES, AUTO):
            raise ValueError(f"schedule: expected one of {(*SCHEDULES, AUTO)}, got {schedule!r}")
        if machine is not None:
            _check_machine(machine)
        _check_spreads(queries, keys)
        if gradients not in GRADIENTS:
            raise ValueError(f"gradients: expected one of {GRADIENTS}, got {gradients!r}")
        B, H, s_q, D = q.shape
        mine = Record(
            host=getattr(comm, "host", None) or socket.gethostname(),
            s_q=s_q,
            s_kv=k.shape[2],
            mask=mask_kind(mask, dtype_name(q)),
            callable_mask=callable(mask),
            structure=_structure(mask),
            B=B,
            H=H,
            H_KV=k.shape[1],
            D=D,
            D_V=v.shape[3],
            dtype=dtype_name(q),
            scale=1 / sqrt(D) if scale is None else float(scale),
            schedule=schedule,
            queries=queries,
            keys=keys,
            gradients=gradients,
            grid=grid_of(grid, schedule, comm.size),
            library=library(q),
            device=device_kind(q),
            call=call,
            machine=machine,
            clock=time.time_ns() // 1000,
            free=_free(q, k, v),
        )
    except (TypeError, ValueError) as error:
        mine = error
    gathered = comm.allgather(mine)
    raise_lowest([r if isinstance(r, Exception) else None for r in gathered])
    records = [r for r in gathered if isinstance(r, Record)]
    _check_equal(records)
    if any(record.callable_mask for record in records):
        kv_start = 0 if keys == "replicated" else sum(r.s_kv for r in records[: comm.rank])
        check_here_or_together(lambda: _check_rule(mask, q, k, kv_start), comm, together=True)
    return records


def _free(q: Array, k: Array, v: Array) -> Room | None:
    """Return `free_memory`; None for a call that hardly needs any."""
    # A device raises an error of its own; and to ask takes as long as a small call.
    large = sum(prod(x.shape) for x in (q, k, v)) >= LARGE
    return free_memory() if large and device_kind(q) == "cpu" else None


def _check_spreads(queries: str, keys: str) -> None:
    for name, given in (("queries", queries), ("keys", keys)):
        if given not in SPREADS:
            raise ValueError(f"{name}: expected one of {SPREADS}, got {given!r}")
    if queries == keys == "replicated":
        raise ValueError(
            "keys: expected 'sharded' where queries are 'replicated', got 'replicated': every rank "
            "would compute the same"
        )


def grid_of(grid: Any, schedule: str, P: int) -> tuple[int, int] | None:
    """Return the numbers of a grid of P ranks, or None; ValueError if it is something else."""
    if grid is None:
        return None
    try:
        got = " ".join(f"{grid!r:.80}".split())
    except Exception:  # an object of the user's may raise anything
        got = type(grid).__name__
    if schedule != "grid":
        raise ValueError(f"grid: expected none with schedule {schedule!r}, got {got}")
    try:
        a, b = map(index, grid)
    except Exception:
        a = b = 0
    if not isinstance(grid, tuple | list) or a < 1 or a * b != P:  # a set has no first
        raise ValueError(f"grid: expected two numbers whose product is P = {P}, got {got}")
    return a, b


def _check_machine(machine: Any) -> None:
    if not hasattr(machine, "matmul"):
        raise TypeError(f"machine: expected a Machine or None, got {type(machine).__name__}")
    machine.check()


def _check_rule(mask: Any, q: Array, k: Array, kv_start: int) -> None:
    """Call a callable mask for one query and this rank's first key, and check what it returns."""
    if not callable(mask) or 0 in (q.shape[2], k.shape[2]):
        return
    one = slice(0, 1)
    try:
        MaskView(mask, kv_start=kv_start).tile(one, one, one, one, arange(q))
    except (TypeError, ValueError) as error:
        text = str(error) if str(error).startswith("mask: ") else f"mask: raised {error!r}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from None
    except Exception as error:  # a user's code may raise anything
        text = f"mask: expected a callable on global indices, got {error!r} from it"
        raise ValueError(text) from None


def _structure(mask: Any) -> Rule | None:
    """Return a mask that knows its own structure, which is sent to all ranks; else None."""
    if not isinstance(mask, Rule):
        return None
    check_sendable(mask)
    return mask


def mask_kind(mask: Any, dtype: str) -> MaskKind:
    """Return an array mask's shape and the dtype in which it is sent."""
    if mask is None or callable(mask):
        return None
    return tuple(mask.shape), "bool" if dtype_name(mask) == "bool" else accumulator(dtype)


def _check_equal(records: list[Record]) -> None:
    """Raise the first mismatch between ranks, or of the problem as a whole."""
    first = records[0]
    S_Q, S_KV = (
        lengths[0] if spread == "replicated" else sum(lengths)
        for spread, lengths in (
            (first.queries, [r.s_q for r in records]), (first.keys, [r.s_kv for r in records])
        )
    )  # fmt: skip
    for rank, record in enumerate(records):
        try:
            for name, argument in EQUAL_ON_ALL_RANKS.items():
                given, expected = getattr(record, name), getattr(records[0], name)
                # 1 / sqrt(D) and D**-0.5 differ in the last bit.
                close = name == "scale" and isclose(given, expected, rel_tol=1e-12)
                if given != expected and not close:
                    symbol = "" if name == argument else f" {name} ="
                    raise (TypeError if name in ("dtype", "library") else ValueError)(
                        f"{argument}: expected rank 0's{symbol} {expected!r}, got{symbol} {given!r}"
                    )
            if record.queries == "replicated" and record.s_q != S_Q:
                raise ValueError(
                    f"q: expected rank 0's s_q = {S_Q} with queries 'replicated', got {record.s_q}"
                )
            if record.keys == "replicated" and record.s_kv != S_KV:
                raise ValueError(
                    f"k: expected rank 0's s_kv = {S_KV} with keys 'replicated', got {record.s_kv}"
                )
            if record.mask is not None:
                check_mask_shape_rows(record.mask[0], S_Q)
            # Replicated queries, or keys, take no schedule.
            schedule = record.schedule if record.queries == record.keys else None
            travel = schedule in MASKS_TRAVEL
            if travel and record.callable_mask != records[0].callable_mask:
                kinds = ["an array or None", "a callable"]
                raise ValueError(
                    "mask: expected a callable on all ranks or on none with schedule "
                    f"{schedule!r}, got {kinds[record.callable_mask]} where rank 0 has "
                    f"{kinds[records[0].callable_mask]}"
                )
            if record.structure is not None:
                record.structure.check(S_Q, S_KV)
            if travel and not same_rule(record.structure, records[0].structure):
                raise ValueError(
                    f"mask: expected rank 0's {records[0].structure!r:.100} with schedule "
                    f"{schedule!r}, got {record.structure!r:.100}, which differs by =="
                )
            if schedule == "ulysses" and record.H_KV % len(records):
                raise ValueError(
                    f"schedule: expected H_KV divisible by the {len(records)} ranks with "
                    f"'ulysses', got H_KV = {record.H_KV}"
                )
        except (TypeError, ValueError) as error:
            raise on_rank(error, rank, len(records)) from None
