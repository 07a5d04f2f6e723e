"""The one collective check: what every rank tells the others before any block moves.

Each rank checks its own arguments, then one all-gather carries its record, or its error, to all.
A mask that is a rule is then asked once, which takes another.
Every rank then comes to the same conclusion from the same records: the error of the lowest rank
that has one, or the first mismatch, or agreement.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isclose, sqrt
from typing import Any

from lvxattn.common.masks import MaskView
from lvxattn.common.validation import (
    Communicator,
    accumulator,
    arange,
    check_attention,
    check_backward,
    check_communicator,
    check_mask_shape_rows,
    device_kind,
    dtype_name,
    library,
    on_rank,
    raise_lowest,
    raise_together,
)

Array = Any
MaskKind = tuple[tuple[int, ...], str] | None
Backward = tuple[Array, Array, Array, Array | None]

SCHEDULES = ("lv-xattn", "ring", "ulysses", "gather")
AUTO = "auto"
QUERIES = ("sharded", "replicated")
# Where a rank works on other ranks' keys: array masks travel, and rules must be the same.
MASKS_TRAVEL = ("ring", "ulysses")

# What must be equal on all ranks, and the argument to name when it is not.
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
    "library": "q",
    "device": "q",
    "call": "call",
}
# What of that concerns the call alone, not its layout.
ONLY_OF_THE_CALL = ("library", "device", "call")


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
    call: str = "forward",
    machine: Any = None,
    check: Callable[[], object] | None = None,
) -> list["Record"]:
    """Return the records of all ranks, in rank order.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    q, k, v, comm, schedule, scale, mask, backward
        As given to `Layout.agree`.
    queries : str
        ``"replicated"``: all ranks hold the same queries, all of them.
    call : str
        What is called, in words; must be equal on all ranks.
    machine : Machine, optional
        Rank 0's says what schedule ``"auto"`` is.
    check : callable, optional
        What an implementation has to check besides, such as whose arrays it computes with: it
        raises what is wrong on this rank.

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
            check_machine(machine)
        if queries not in QUERIES:
            raise ValueError(f"queries: expected one of {QUERIES}, got {queries!r}")
        mine = Record.of(q, k, v, schedule, scale, mask, queries, call, machine, comm)
    except (TypeError, ValueError) as error:
        mine = error
    gathered = comm.allgather(mine)
    raise_lowest([r if isinstance(r, Exception) else None for r in gathered])
    records = [r for r in gathered if isinstance(r, Record)]
    _check_equal(records)
    if any(record.callable_mask for record in records):
        raise_together(_ask(mask, q, k, sum(r.s_kv for r in records[: comm.rank])), comm)
    return records


def _ask(mask: Any, q: Array, k: Array, kv_start: int) -> Exception | None:
    """Ask a rule about one query and this rank's first key; return what is wrong with it."""
    if not callable(mask) or 0 in (q.shape[2], k.shape[2]):
        return None
    one = slice(0, 1)
    try:
        view = MaskView(mask, kv_start=kv_start)
        view.tile(one, one, one, one, arange(q))
    except (TypeError, ValueError) as error:
        text = str(error) if str(error).startswith("mask: ") else f"mask: raised {error!r}"
        return TypeError(text) if isinstance(error, TypeError) else ValueError(text)
    except Exception as error:  # a user's code may raise anything
        return ValueError(f"mask: expected a rule for global indices, got {error!r} from it")
    return None


@dataclass(frozen=True)
class Record:
    """What one rank tells the others."""

    host: str
    s_q: int
    s_kv: int
    mask: MaskKind
    callable_mask: bool
    B: int
    H: int
    H_KV: int
    D: int
    D_V: int
    dtype: str
    scale: float
    schedule: str
    queries: str
    library: str
    device: str
    call: str
    machine: Any
    clock: int

    @staticmethod
    def of(
        q: Array,
        k: Array,
        v: Array,
        schedule: str,
        scale: float | None,
        mask: Any,
        queries: str,
        call: str,
        machine: Any,
        comm: Communicator,
    ) -> "Record":
        """Return the record of arguments that this rank has found no fault with."""
        B, H, s_q, D = q.shape
        return Record(
            host=getattr(comm, "host", None) or socket.gethostname(),
            s_q=s_q,
            s_kv=k.shape[2],
            mask=mask_kind(mask, dtype_name(q)),
            callable_mask=callable(mask),
            B=B,
            H=H,
            H_KV=k.shape[1],
            D=D,
            D_V=v.shape[3],
            dtype=dtype_name(q),
            scale=1 / sqrt(D) if scale is None else float(scale),
            schedule=schedule,
            queries=queries,
            library=library(q),
            device=device_kind(q),
            call=call,
            machine=machine,
            clock=time.time_ns() // 1000,
        )


def check_machine(machine: Any) -> None:
    """Refuse what `lvxattn.plan` cannot reckon with."""
    if not hasattr(machine, "matmul"):
        raise TypeError(f"machine: expected a Machine or None, got {type(machine).__name__}")
    machine.check()


def mask_kind(mask: Any, dtype: str) -> MaskKind:
    """Return an array mask's shape and the dtype in which it travels."""
    if mask is None or callable(mask):
        return None
    return tuple(mask.shape), "bool" if dtype_name(mask) == "bool" else accumulator(dtype)


def _check_equal(records: list[Record]) -> None:
    replicated = records[0].queries == "replicated"
    S_Q = records[0].s_q if replicated else sum(r.s_q for r in records)
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
            if replicated and record.s_q != S_Q:
                raise ValueError(
                    f"q: expected rank 0's s_q = {S_Q} with queries 'replicated', got {record.s_q}"
                )
            if record.mask is not None:
                check_mask_shape_rows(record.mask[0], S_Q)
            # Replicated queries take no schedule.
            schedule = None if replicated else record.schedule
            travel = schedule in MASKS_TRAVEL
            if travel and record.callable_mask != records[0].callable_mask:
                kinds = ["an array or None", "a callable"]
                raise ValueError(
                    "mask: expected a callable on all ranks or on none with schedule "
                    f"{schedule!r}, got {kinds[record.callable_mask]} where rank 0 has "
                    f"{kinds[records[0].callable_mask]}"
                )
            if schedule == "ulysses" and record.H_KV % len(records):
                raise ValueError(
                    "schedule: expected another one than 'ulysses', which needs H_KV to be a "
                    f"multiple of the {len(records)} ranks, got H_KV = {record.H_KV}"
                )
        except (TypeError, ValueError) as error:
            raise on_rank(error, rank, len(records)) from None
