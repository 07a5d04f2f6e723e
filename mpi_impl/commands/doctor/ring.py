"""Messages really sent, from every rank to the next: whether they arrive whole, and how fast."""

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl.transport.buffers import buffer
from lvxattn.mpi_impl.transport.transfers import Transfer, Transfers
from lvxattn.mpi_impl.transport.watchdog import wait

_SMALL, _LARGE = 1, 2**22
_STEPS, _LARGE_STEPS = 100, 5


@dataclass(frozen=True)
class Link:
    """What came from the rank before this one.

    Attributes
    ----------
    source, rank : int
    whole : bool
        Whether every byte arrived as it was sent.
    latency : float
        Seconds for a message of one byte, on average.
    bandwidth : float
        Bytes a second for messages of 4 MiB, the best.
    """

    source: int
    rank: int
    whole: bool
    latency: float
    bandwidth: float


def send_round(comm: MPI.Intracomm) -> Link:
    """Send small and large messages round.

    Collective: every rank of comm calls this.
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    whole, best = True, {}
    for size, steps, rounds in ((_SMALL, _STEPS, 3), (_LARGE, 1, _LARGE_STEPS)):
        sent, received = np.full(size, comm.rank % 251, np.uint8), np.full(size, 255, np.uint8)
        comm.Sendrecv(sent, right, recvbuf=received, source=left)  # connections are made by use
        whole = whole and bool((received == left % 251).all())
        times = []
        for _ in range(rounds):
            start = perf_counter()
            for _ in range(steps):
                comm.Sendrecv(sent, right, recvbuf=received, source=left)
            times.append((perf_counter() - start) / steps)
        best[size] = min(times)
    return Link(left, comm.rank, whole, best[_SMALL], _LARGE / best[_LARGE])


def send_from_device(comm: MPI.Intracomm, xp: Any) -> bool:
    """Send a small and a large block round as a pass does, and tell whether they arrived whole.

    Collective: every rank of comm calls this.  The self-test is one process: it knows nothing of
    the ways between processes and hosts.

    Parameters
    ----------
    comm : MPI.Intracomm
    xp : module
        cupy; blocks lie on the current device.
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    whole = True
    for size in (_SMALL, _LARGE):
        there, here = buffer(xp, size), buffer(xp, size)
        there.array[...] = comm.rank % 251
        there.filled()
        (block, written), (room, empty) = there.sendable(size), here.receivable(size)
        coming = Transfer(partial(comm.Irecv, [room, MPI.BYTE], left), empty)
        going = Transfer(partial(comm.Isend, [block, MPI.BYTE], right), written)
        wait(Transfers([coming, going]), None, lambda: "a block of device memory")
        here.deliver(size)
        whole = whole and bool((xp.asnumpy(here.array) == left % 251).all())
    return whole
