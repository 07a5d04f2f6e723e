"""Time passes of several kinds in turn on the ranks of this run; rank 0 prints JSON.

    mpiexec -n P python -m mpi4py benchmarks/passes.py '[{"kinds": ["none", "lv-xattn"], ...}, ...]'

Every item holds the arguments of a `Work`.  The kinds take turns, round by round, so that other
load affects all of them alike: ratios are to be taken within a round, and their median over rounds.
Before, each has a turn that does not count, in which its memory is new to the process.

    "lv-xattn", "ring"   a schedule, or any other of them; a grid of P / 2 x 2 ranks
    "none"               "lv-xattn" with communication switched off (`MuteComm`)
    "blocks"             its attention alone, of as many queries and keys, one block a rank
    "one"                one rank alone does the whole problem, the others sleep
    "each"               every rank does the whole problem alone, all at the same time
"""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np
from mpi4py import MPI
from netlab.lab import sent_by
from threadpoolctl import threadpool_limits

from lvxattn.common.handshake import SCHEDULES
from lvxattn.common.layout import share
from lvxattn.mpi_impl import (
    Layout,
    Meter,
    block_attention,
    block_attention_backward,
    cross_attention,
    cross_attention_backward,
    measure,
)


@dataclass(frozen=True)
class Work:
    """A problem to be timed, and the number of turns.

    Attributes
    ----------
    kinds : list of str
    S_Q, S_KV, H, H_KV, D : int
        The problem; B = 1, fp32.
    backward : bool
        A backward pass follows every forward pass.
    rounds : int
        Maximum number of rounds.
    seconds : float
        Time after which no round begins, once `least` are done.
    least : int
    ring_every : int
        Ring Attention, which takes long, has a turn in every `ring_every`-th round only.
    machine : bool
        Whether to measure the machine's figures first, for these heads.
    """

    kinds: list[str]
    S_Q: int
    S_KV: int
    H: int = 8
    H_KV: int = 8
    D: int = 64
    backward: bool = False
    rounds: int = 5
    seconds: float = 60.0
    ring_every: int = 1
    least: int = 3
    machine: bool = False


def main() -> None:
    """Time every item of the command line."""
    comm = MPI.COMM_WORLD
    with threadpool_limits(1):
        warm_up(comm)
        alone = messages_alone(comm)
        results = [timed(Work(**item), comm) for item in json.loads(sys.argv[1])]
    if comm.rank == 0:
        mpi = " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").split())
        json.dump({"messages_alone": alone, "mpi": mpi, "results": results}, sys.stdout)


def timed(work: Work, comm: MPI.Intracomm) -> dict[str, Any]:
    """Return the work, and one record per turn for every kind.  Collective."""
    shape = {"H": work.H, "H_KV": work.H_KV, "D": work.D}
    machine = asdict(measure(comm, **shape)) if work.machine else None
    problem = {kind: Problem(work, kind, comm) for kind in work.kinds}
    turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in work.kinds}
    for kind in work.kinds:
        problem[kind].turn(comm)
    start = perf_counter()
    for turn in range(work.rounds):
        if turn >= work.least and comm.bcast(perf_counter() - start > work.seconds):
            break
        for kind in work.kinds:
            if kind != "ring" or turn % work.ring_every == 0:
                turns[kind].append({"round": turn, **problem[kind].turn(comm)})
    return {**asdict(work), "machine": machine, "P": comm.size, "turns": turns}


class Problem:
    """One rank's part in one kind of pass."""

    def __init__(self, work: Work, kind: str, comm: MPI.Intracomm) -> None:
        self.backward, self.kind = work.backward, kind
        self.takes_part = kind != "one" or comm.rank == 0
        alone = kind in ("one", "each")
        group: Any = MPI.COMM_SELF if alone else comm
        rng = np.random.default_rng(comm.rank)
        parts = (share(whole, group.rank, group.size) for whole in (work.S_Q, work.S_KV))
        s_q, s_kv = (part.stop - part.start for part in parts)
        tall, wide = (1, work.H, s_q, work.D), (1, work.H_KV, s_kv, work.D)
        self.q, self.k, self.v, self.dout = (
            rng.standard_normal(shape, dtype=np.float32) for shape in (tall, wide, wide, tall)
        )
        options: Any = {"schedule": kind if kind in SCHEDULES else SCHEDULES[0]}
        if kind == "grid":
            options["grid"] = comm.size // 2, 2
        self.layout = Layout.agree(self.q, self.k, self.v, group, **options)
        self.group = MuteComm(comm) if kind == "none" else group

    def turn(self, comm: MPI.Intracomm) -> dict[str, Any]:
        """Time one turn.  Collective; the record is the same on every rank.

        Returns
        -------
        dict
            forward, total : seconds, from the first rank's start to the last one's end
            computing, waiting : seconds of every rank
            cpu : seconds that every rank kept a core busy, waiting for messages included
            others : cores that other processes kept busy, on average
            bytes : that every rank counted as sent
            left_host : bytes that every rank counted as sent to another host
            link : bytes that the counter of every rank's link saw, in a lab
        """
        meter = Meter()
        quiet_barrier(comm)
        link = link_bytes()
        busy, clock = busy_seconds(), perf_counter()
        sleep_until_one_moment(comm)
        cpu = process_time()
        start = middle = end = None
        if self.takes_part:
            start = perf_counter()
            middle, end = self.blocks(comm.size) if self.kind == "blocks" else self.passes(meter)
        cpu = process_time() - cpu
        quiet_barrier(comm)
        link, busy = link_bytes() - link, busy_seconds() - busy
        others = (busy - comm.allreduce(cpu)) / (perf_counter() - clock)
        times = [t for t in comm.allgather((start, middle, end)) if t[0] is not None]
        starts, middles, ends = zip(*times, strict=True)
        hosts = comm.allgather(socket.gethostname())
        leaves = self.group.size > 1 and hosts[self.layout.right] != hosts[comm.rank]
        return {
            "forward": max(middles) - min(starts),
            "total": max(ends) - min(starts),
            "computing": comm.allgather(meter.computing),
            "waiting": comm.allgather(meter.waiting),
            "cpu": comm.allgather(cpu),
            "others": comm.bcast(others),
            "bytes": comm.allgather(meter.bytes),
            "left_host": comm.allgather(meter.bytes if leaves else 0),
            "host": hosts,
            "link": comm.allgather(link),
        }

    def passes(self, meter: Meter) -> tuple[float, float]:
        """Run forward and backward, and return when each has ended."""
        args: Any = (self.q, self.k, self.v)
        options: Any = {"layout": self.layout, "meter": meter}
        out, lse = cross_attention(*args, self.group, **options)
        middle = end = perf_counter()
        if self.backward:
            cross_attention_backward(self.dout, *args, out, lse, self.group, **options)
            end = perf_counter()
        return middle, end

    def blocks(self, P: int) -> tuple[float, float]:
        """Compute the blocks of a rank in lv-xattn and nothing else, P times its own queries."""
        args: Any = (self.q, self.k, self.v)
        for _ in range(P):
            out, lse = block_attention(*args, scale=self.layout.scale)
        middle = end = perf_counter()
        if self.backward:
            delta = (self.dout * out).sum(axis=-1)
            dk, dv = np.zeros_like(self.k), np.zeros_like(self.v)
            for _ in range(P):
                block_attention_backward(
                    self.dout, *args, lse, delta, dk, dv, scale=self.layout.scale
                )
            end = perf_counter()
        return middle, end


class MuteComm:
    """A communicator whose messages cost nothing, for the time of a pass without communication.

    With it, an implementation does what it does otherwise: the same tiles, calls and shapes, the
    same merges, buffers and requests, but nothing is sent.  A rank "receives" what it sends, to
    compute with numbers of the usual size; for this a message is copied once inside the rank.
    Results are wrong, and ranks must hold shares of one size.

    Parameters
    ----------
    comm : MPI.Intracomm
        The communicator whose rank and size it shows, and over which the layout is agreed on.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._posted: dict[int, Any] = {}

    def allgather(self, x: Any) -> list[Any]:
        """Return what this rank gives as that of every rank."""
        return [x] * self.size

    def Iallreduce(self, here: Any, found: Any, op: MPI.Op) -> MPI.Request:  # noqa: ARG002
        """Keep what is true on this rank, that its lse is large; the request is complete."""
        found[...] = here
        return MPI.Request()

    def Irecv(self, buffer: list[Any], source: int, tag: int) -> MPI.Request:  # noqa: ARG002
        """Keep the buffer; the request is complete."""
        self._posted[tag] = buffer[0]
        return MPI.Request()

    def Isend(self, buffer: list[Any], dest: int, tag: int) -> MPI.Request:  # noqa: ARG002
        """Copy the message to the posted buffer; the request is complete."""
        self._posted.pop(tag)[...] = buffer[0]
        return MPI.Request()


def quiet_barrier(comm: MPI.Intracomm) -> None:
    """Wait for all ranks without spinning, which would take cores from those that compute."""
    request = comm.Ibarrier()
    while not request.Test():
        sleep(2e-4)


def sleep_until_one_moment(comm: MPI.Intracomm) -> None:
    """Wait, asleep, until the same moment on all ranks: their clocks are this machine's."""
    moment = comm.allreduce(perf_counter(), MPI.MAX) + 2e-3
    sleep(max(0.0, moment - perf_counter()))


def busy_seconds() -> float:
    """Return the busy time of all cores of this machine."""
    with open("/proc/stat") as file:
        ticks = [int(n) for n in file.readline().split()[1:9]]
    idle, waiting_for_disk = ticks[3:5]
    return (sum(ticks) - idle - waiting_for_disk) / os.sysconf("SC_CLK_TCK")


def link_bytes() -> int:
    """Return the bytes that left over this host's link; 0 outside a lab."""
    return sent_by("self") if os.environ.get("NETLAB_HOSTS") else 0


def warm_up(comm: MPI.Intracomm) -> None:
    """Let MPI connect every rank with its neighbours, and BLAS make its buffers."""
    x = np.ones((512, 512), np.float32)
    x @ x
    comm.alltoall([x] * comm.size)


def messages_alone(comm: MPI.Intracomm) -> float:
    """Return the rate, in bytes per second, at which all ranks send 8 MB to the right at once."""
    x, y = np.ones(2**23, np.uint8), np.ones(2**23, np.uint8)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    rates = []
    for _ in range(3):
        comm.Barrier()
        start = perf_counter()
        comm.Sendrecv(x, right, recvbuf=y, source=left)
        rates.append(x.nbytes / (comm.allreduce(perf_counter(), MPI.MAX) - start))
    return sorted(rates)[1]


if __name__ == "__main__":
    main()
