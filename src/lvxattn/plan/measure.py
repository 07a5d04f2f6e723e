"""Measure the machine at hand by a few short probes, run by all ranks at once.

    start      a block of one query and one key
    call       forward and backward on one rank alone, with one query and one key
    copy       growing arrays into new memory, until one takes BLOCK
    memory     one query, growing numbers of keys, until a block takes BLOCK
    matmul     growing numbers of queries and keys, until a block takes BLOCK
    hiding     as many queries as make arithmetic and reading equally long
    latency    messages of one byte round a ring
    bandwidth  growing messages round a ring, until one takes MESSAGE

Ranks that share cores, caches or a link do so in the probes as in a run.  Links inside a host are
measured on a ring over its ranks, those between hosts on a ring over each host's first rank.
"""

import socket
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Protocol

from lvxattn.common.validation import FLOATING, Communicator, raise_together
from lvxattn.common.wire import ITEMSIZE
from lvxattn.plan.machine import Link, Machine, Measured

BLOCK, MESSAGE = 0.01, 0.1
"""Seconds that a block, and a message, has to take to be measured."""
TURNS = 5
"""Number of repetitions; of the slowest rank in each, the median counts."""
FEWEST_KEYS, MOST_KEYS, MOST_BYTES = 1024, 2**20, 2**26


class Probe(Protocol):
    """The work that is timed on one rank."""

    by: str
    """The implementation, as ``"mpi_impl"``."""
    shape: tuple[int, int, int]
    """H, H_KV, D."""
    dtype: str

    @property
    def room(self) -> float:
        """Bytes of memory of this rank."""

    @property
    def device_name(self) -> str:
        """Where this rank computes."""

    def prepare(self, s_q: int, s_kv: int) -> Callable[[], None]:
        """Return a function that attends from `s_q` queries to `s_kv` keys and waits for it."""

    def call(self) -> Callable[[], None]:
        """Return a function that runs both passes on this rank alone, on one query and one key."""

    def copy(self, nbytes: int) -> Callable[[], None]:
        """Return a function that copies `nbytes` bytes into new memory."""

    def shift(self, nbytes: int, left: int, right: int) -> Callable[[], None]:
        """Return a function that sends a message to the right and receives one from the left."""

    def together(self) -> None:
        """Wait for all ranks without using a core.  Collective: every rank calls this."""


def measure(comm: Communicator, probe: Probe, name: str = "here") -> Machine:
    """Measure this machine, in a few seconds.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    comm : Communicator
    probe : Probe
        `lvxattn.mpi_impl.measure` and `lvxattn.torch_impl.measure` have their own.
    name : str
        Name of the machine.

    Returns
    -------
    Machine
        The same on all ranks.  A link that these ranks cannot measure, as that between hosts on one
        host, gets the figures of the other; on a single rank, those of its memory.

    Raises
    ------
    ValueError
        The probe's heads, width or dtype are invalid; the same on all ranks.
    """
    raise_together(_wrong(probe), comm)
    start = _time(comm, probe, probe.prepare(1, 1))
    matmul, memory, hiding = _rates(comm, probe, start)
    call = max(0.0, _time(comm, probe, probe.call()) / 2 - start)
    nbytes = 2**22
    while (took := _time(comm, probe, probe.copy(nbytes))) < BLOCK and nbytes < MOST_BYTES:
        nbytes *= 2
    hosts = comm.allgather(socket.gethostname())
    members = [[r for r, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    inside = _link(comm, probe, members)
    between = _link(comm, probe, [[ranks[0] for ranks in members]])
    alone = Link(memory, start)
    devices = dict.fromkeys(comm.allgather(probe.device_name))
    return Machine(
        name,
        matmul,
        memory,
        start,
        min(comm.allgather(probe.room)),
        inside or between or alone,
        between or inside or alone,
        max(map(len, members)),
        comm.size,
        nbytes / took,
        call,
        hiding,
        Measured(probe.by, " and ".join(devices), *probe.shape, probe.dtype),
    )


def _wrong(probe: Probe) -> ValueError | None:
    for name, count in zip(("H", "H_KV", "D"), probe.shape, strict=True):
        if count < 1:
            return ValueError(f"{name}: expected at least 1, got {count}")
    H, H_KV, _ = probe.shape
    if H % H_KV:
        return ValueError(f"H_KV: expected a divisor of H = {H}, got {H_KV}")
    if probe.dtype not in FLOATING:
        return ValueError(f"dtype: expected one of {FLOATING}, got {probe.dtype!r}")
    return None


def _rates(comm: Communicator, probe: Probe, start: float) -> tuple[float, float, float]:
    """Return the rates of arithmetic and reading, and the fraction of overlap (`hiding`)."""
    H, H_KV, D = probe.shape
    s_kv = FEWEST_KEYS
    while (one := _time(comm, probe, probe.prepare(1, s_kv))) < BLOCK and s_kv < MOST_KEYS:
        s_kv *= 2
    rows, keys = 128, 512
    while (many := _time(comm, probe, probe.prepare(rows, keys))) < BLOCK and rows < 8192:
        rows, keys = (2 * rows, keys) if rows < keys else (rows, 2 * keys)
    matmul = 4 * D * H * rows * keys / max(many - start, 1e-9)
    # One query takes as long as reading the keys, except for its own arithmetic.
    arithmetic = 4 * D * H * s_kv / matmul
    reading = max(one - start, arithmetic)
    balanced = max(1, round(reading / arithmetic))
    both = _time(comm, probe, probe.prepare(balanced, s_kv)) - start
    hiding = 0.0
    for _ in range(8):
        reading = max(one - start - (1 - hiding) * arithmetic, arithmetic)
        long, short = sorted((reading, balanced * arithmetic), reverse=True)
        hiding = min(1.0, max(0.0, (long + short - both) / short))
    return matmul, 2 * D * H_KV * s_kv * ITEMSIZE[probe.dtype] / reading, hiding


def _link(comm: Communicator, probe: Probe, rings: list[list[int]]) -> Link | None:
    """Return a link's figures from rings of ranks that run at once; None if no ring has two."""
    mine = next((ring for ring in rings if comm.rank in ring), [])
    if max(map(len, rings)) < 2:
        return None

    def turn(nbytes: int, times: int = 1) -> float:
        shifts: list[Callable[[], None]] = []  # none on a rank that is in no ring
        if len(mine) > 1:
            at = mine.index(comm.rank)
            shifts = [probe.shift(nbytes, mine[at - 1], mine[(at + 1) % len(mine)])] * times

        def repeat() -> None:
            for shift in shifts:
                shift()

        return _time(comm, probe, repeat) / times

    latency = turn(1, 64)
    nbytes = 2**14
    while (took := turn(nbytes)) < MESSAGE and nbytes < MOST_BYTES:
        nbytes *= 2 if took > MESSAGE / 8 else 4
    return Link(nbytes / max(took - latency, 1e-9), latency)


def _time(comm: Communicator, probe: Probe, work: Callable[[], None]) -> float:
    """Return the median of the slowest rank's seconds, all ranks working at once."""
    mine: list[float] = []
    work()
    for _ in range(TURNS):
        probe.together()
        start = perf_counter()
        work()
        mine.append(perf_counter() - start)
    slowest: list[float] = [max(turn) for turn in zip(*comm.allgather(mine), strict=True)]
    return median(slowest)
