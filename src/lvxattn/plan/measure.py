"""Measure the machine at hand by a few short probes, run by all ranks at once.

    start      a block of one query and one key
    memory     one query, growing numbers of keys, until a block takes BLOCK
    matmul     growing numbers of queries and keys, until a block takes BLOCK
    hiding     as many queries as make arithmetic and reading equally long
    copy       growing arrays into an array, until one takes BLOCK
    copy_new   the same array into memory that is new to the process
    call       forward and backward on one rank alone, with one query and two keys
    message    the same with all ranks, less the time that the plan says: lv-xattn, and gather
    latency    messages of one byte round a ring
    bandwidth  growing messages round a ring, until one takes MESSAGE
    busy       the same message, while every rank computes for as long

Ranks that share cores, caches or a link do so in the probes as in a run: what takes less than BLOCK
is repeated, so that they do it at once.  The probes take turns, so that a disturbed moment spoils
one turn of each; of the slowest rank's times the median counts.  Links inside a host are measured
on a ring over its ranks, those between hosts on a ring over each host's first rank.
"""

import socket
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from statistics import median
from time import perf_counter
from typing import Any, Protocol

from lvxattn.common.validation import FLOATING, Communicator, raise_together
from lvxattn.common.wire import ITEMSIZE
from lvxattn.plan.machine import Link, Machine, Measured
from lvxattn.plan.models import planned
from lvxattn.plan.simulate import play
from lvxattn.plan.steps import Send, Wait, steps

BLOCK, MESSAGE = 0.01, 0.2
"""Seconds that a block, and a message, has to take to be measured."""
TURNS, FEWEST_TURNS, LIMIT = 9, 3, 4.0
"""Numbers of turns of every probe, and the seconds that all should take together."""
LONG = 0.1
"""Seconds of a probe that has the fewest turns, so that the short ones have more."""
FEWEST_KEYS, MOST_KEYS = 1024, 2**20
FEWEST_BYTES, MOST_BYTES = 2**25, 2**26
"""Of a copy; glibc takes arrays of 32 MiB and more from the system each time."""


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

    def prepare(self, s_q: int, s_kv: int, *, backward: bool = False) -> Callable[[], None]:
        """Return a function that attends from `s_q` queries to `s_kv` keys and waits for it.

        Or one that differentiates this.
        """

    def call(self, *, alone: bool, schedule: str = "lv-xattn") -> Callable[[], None]:
        """Return a function that runs both passes of a schedule on one query and two keys a rank.

        Alone, or on all ranks.
        """

    def copy(self, nbytes: int, *, new: bool = False) -> Callable[[], None]:
        """Return a function that copies `nbytes` bytes, into an array or into a new one."""

    def shift(
        self, nbytes: int, left: int, right: int, block: tuple[int, int] = (0, 0), times: int = 0
    ) -> Callable[[], None]:
        """Return a function that sends a message to the right and receives one from the left.

        Meanwhile it attends from and to a block's queries and keys, so many times.
        """

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
    hosts = comm.allgather(socket.gethostname())
    members = [[r for r, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    timer = _Timer(comm, probe)
    block = _Block(timer)
    timer.add("alone", probe.call(alone=True))
    for schedule in ("lv-xattn", "gather"):
        timer.add(schedule, probe.call(alone=False, schedule=schedule))
    nbytes = timer.grow("copy", probe.copy, FEWEST_BYTES, BLOCK)
    # What was freed long ago may have gone back to the machine's host.
    timer.add("copy_new", probe.copy(nbytes, new=True), warm=True)
    inside = _Ring(timer, "inside", members, block)
    between = _Ring(timer, "between", [[ranks[0] for ranks in members]], block)
    timer.take_turns()

    rates = block.rates()
    start = rates["start"]
    alone = Link(rates["memory"], start)
    devices = dict.fromkeys(comm.allgather(probe.device_name))
    machine = Machine(
        name=name,
        room=min(comm.allgather(probe.room)),
        inside=inside.link() or between.link() or alone,
        between=between.link() or inside.link() or alone,
        ranks_per_host=max(map(len, members)),
        ranks=comm.size,
        copy=nbytes / max(timer.seconds("copy"), 1e-9),
        copy_new=nbytes / max(timer.seconds("copy_new"), 1e-9),
        call=max(0.0, timer.seconds("alone") / 2 - start),
        measured=Measured(probe.by, " and ".join(devices), *probe.shape, probe.dtype),
        **rates,
    )
    machine = _with_messages(machine, timer, "message", "lv-xattn")
    return _with_messages(machine, timer, "message_at_once", "gather")


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


class _Timer:
    """Times probes in turn.  Collective: every rank makes the same calls."""

    def __init__(self, comm: Communicator, probe: Probe) -> None:
        self.comm, self.probe = comm, probe
        self._work: dict[str, tuple[Callable[[], object], int, bool]] = {}
        self._took: dict[str, float] = {}
        self._mine: dict[str, list[float]] = {}

    def add(self, name: str, work: Callable[[], object], *, warm: bool = False) -> float:
        """Add a probe, and return about how long it takes the slowest rank.

        One that is to be warm does its work once in every turn before it is timed.
        """
        work()
        took = max(self.comm.allgather(self._once(work, 1)))
        times = min(256, max(1, ceil(BLOCK / max(took, 1e-9))))
        if times > 1:  # what is short is not known from one time
            took = max(self.comm.allgather(self._once(work, times)))
        self._work[name], self._took[name] = (work, times, warm), took * (times + warm)
        return took

    def grow(
        self, name: str, prepare: Callable[[int], Callable[[], None]], n: int, least: float,
        most: int = MOST_BYTES,
    ) -> int:  # fmt: skip
        """Add the first of growing probes that takes `least` seconds, and return its size."""
        while (took := self.add(name, prepare(n))) < least and n < most:
            n *= 2 if took > least / 8 else 4
        return n

    def take_turns(self) -> None:
        """Time every probe `TURNS` times, or fewer where that takes long."""
        long = {name: took for name, took in self._took.items() if took > LONG}
        rest = sum(self._took.values()) - sum(long.values())
        left = LIMIT - FEWEST_TURNS * sum(long.values())
        turns = min(TURNS, max(FEWEST_TURNS, int(left / max(rest, 1e-9))))
        mine: dict[str, list[float]] = {name: [] for name in self._work}
        for turn in range(turns):
            for name, (work, times, warm) in self._work.items():
                if turn < FEWEST_TURNS or name not in long:
                    if warm:
                        work()
                    mine[name].append(self._once(work, times))
        self._mine = {
            name: [max(turn) for turn in zip(*self.comm.allgather(found), strict=True)]
            for name, found in mine.items()
        }

    def about(self, name: str) -> float:
        """Return about how long a probe takes, before its turns."""
        return self._took[name] / self._work[name][1]

    def seconds(self, name: str) -> float:
        """Return a probe's median."""
        return median(self._mine[name])

    def _once(self, work: Callable[[], object], times: int) -> float:
        # Of ranks that have waited long, not all wake up at once; those that have just met, do.
        self.probe.together()
        self.probe.together()
        start = perf_counter()
        for _ in range(times):
            work()
        return (perf_counter() - start) / times


class _Block:
    """The probes of one block: its start, arithmetic, reading, and both at once."""

    def __init__(self, timer: _Timer) -> None:
        self.timer, prepare = timer, timer.probe.prepare
        shortest = prepare(1, 1), prepare(1, 1, backward=True)
        start = timer.add("start", lambda: [work() for work in shortest]) / 2
        # Its arrays are kept until all turns are over, and need not take BLOCK: they are read
        # again and again, and exceed caches.
        self.s_kv = timer.grow(
            "one", lambda s_kv: prepare(1, s_kv), FEWEST_KEYS, BLOCK / 4, most=MOST_KEYS
        )
        self.size = 256, 1024  # about a tile
        while (many := timer.add("many", prepare(*self.size))) < BLOCK and self.size[0] < 8192:
            rows, keys = self.size
            self.size = (2 * rows, keys) if rows < keys else (rows, 2 * keys)
        one = timer.add("one", prepare(1, self.s_kv))
        arithmetic = self._flops(1, self.s_kv) / self._flops(*self.size) * (many - start)
        self.balanced = max(1, round(max(one - start, arithmetic) / max(arithmetic, 1e-9)))
        timer.add("both", prepare(self.balanced, self.s_kv))
        timer.add("one, backward", prepare(1, self.s_kv, backward=True))
        timer.add("many, backward", prepare(*self.size, backward=True))

    def rates(self) -> dict[str, float]:
        """Return the figures of a `Machine` that are those of a block."""
        start = self.timer.seconds("start") / 2
        one, many, both, one_back, many_back = (
            self.timer.seconds(name) - start
            for name in ("one", "many", "both", "one, backward", "many, backward")
        )
        flops, flops_of_one = self._flops(*self.size), self._flops(1, self.s_kv)
        matmul = flops / max(many, 1e-9)
        matmul_backward = 2.5 * flops / max(many_back, 1e-9)
        # One query takes as long as reading the keys, except for its own arithmetic.
        arithmetic, hiding = flops_of_one / matmul, 0.0
        for _ in range(8):
            reading = max(one - (1 - hiding) * arithmetic, arithmetic)
            long, short = sorted((reading, self.balanced * arithmetic), reverse=True)
            hiding = min(1.0, max(0.0, (long + short - both) / short))
        arithmetic = 2.5 * flops_of_one / matmul_backward
        reading_backward = max(one_back - (1 - hiding) * arithmetic, arithmetic)
        _, H_KV, D = self.timer.probe.shape
        nbytes = 2 * D * H_KV * self.s_kv * ITEMSIZE[self.timer.probe.dtype]
        return {
            "start": start,
            "matmul": matmul,
            "memory": nbytes / reading,
            "hiding": hiding,
            "matmul_backward": matmul_backward,
            "memory_backward": 3 * nbytes / reading_backward,
        }

    def _flops(self, s_q: int, s_kv: int) -> int:
        H, _, D = self.timer.probe.shape
        return 4 * D * H * s_q * s_kv


class _Ring:
    """The probes of a link: rings of ranks that run at once, or none if no ring has two."""

    def __init__(self, timer: _Timer, name: str, rings: list[list[int]], block: _Block) -> None:
        self.timer, self.name, self.nbytes = timer, name, 0
        ring = next((ring for ring in rings if timer.comm.rank in ring), [])
        if max(map(len, rings)) < 2:
            return

        def shift(nbytes: int, **beside: Any) -> Callable[[], None]:
            if len(ring) < 2:  # nothing on a rank that is in no ring
                return lambda: None
            at = ring.index(timer.comm.rank)
            left, right = ring[at - 1], ring[(at + 1) % len(ring)]
            return timer.probe.shift(nbytes, left, right, **beside)

        timer.add(f"latency {name}", shift(1))
        self.nbytes = timer.grow(f"bandwidth {name}", shift, 2**14, MESSAGE)
        took = timer.about(f"bandwidth {name}")
        self.times = min(256, max(1, round(took / max(timer.about("many"), 1e-9))))
        work = shift(self.nbytes, block=block.size, times=self.times)
        timer.add(f"busy {name}", work)

    def link(self) -> Link | None:
        """Return the link's figures."""
        if not self.nbytes:
            return None
        latency, took, beside = (
            self.timer.seconds(f"{what} {self.name}") for what in ("latency", "bandwidth", "busy")
        )
        short, long = sorted((took, self.times * self.timer.seconds("many")))
        busy = min(1.0, max(0.0, (beside - long) / max(short, 1e-9)))
        return Link(self.nbytes / max(took - latency, 1e-9), latency, busy)


def _with_messages(machine: Machine, timer: _Timer, name: str, schedule: str) -> Machine:
    """Return the machine with what each message of a schedule costs a rank."""
    P, (H, H_KV, D) = machine.ranks, timer.probe.shape
    shape = (1, H, P, D), (1, H_KV, 2 * P, D)
    layout = planned(*shape, P, dtype=timer.probe.dtype, schedule=schedule)
    calls = [x for b in (False, True) for x in steps(layout, 0, backward=b)]
    number = max(1, sum(isinstance(x, Send | Wait) for x in calls))
    for _ in range(8):  # part of it is hidden behind latency
        planned_seconds = sum(play(layout, machine, backward=b).seconds for b in (False, True))
        more = (timer.seconds(schedule) - planned_seconds) / number
        machine = replace(machine, **{name: max(0.0, getattr(machine, name) + more)})
    return machine
