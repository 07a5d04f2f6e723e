"""A communicator that records its calls, messages and requests.

Everything is handed on to the communicator underneath, and all names that are asked for are
counted, so that a test can say "nothing but blocks was sent".
"""

import random
import time
from collections import Counter
from typing import Any

from mpi4py import MPI


class Watched:
    """Delegates to an MPI communicator and records calls.

    Attributes
    ----------
    calls : Counter
        How often each method was called.
    sent, received : list of (rank, tag, bytes)
        What was handed to Isend, and to Irecv.
    requests : list
        Every request that Isend and Irecv returned.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.calls: Counter[str] = Counter()
        self.sent: list[tuple[int, int, int]] = []
        self.received: list[tuple[int, int, int]] = []
        self.requests: list[MPI.Request] = []

    def Isend(self, message: Any, dest: int, tag: int) -> MPI.Request:
        self.calls["Isend"] += 1
        self.sent.append((dest, tag, nbytes(message)))
        self.requests.append(self.start_send(message, dest, tag))
        return self.requests[-1]

    def Irecv(self, message: Any, source: int, tag: int) -> MPI.Request:
        self.calls["Irecv"] += 1
        self.received.append((source, tag, nbytes(message)))
        self.requests.append(self.comm.Irecv(message, source, tag))
        return self.requests[-1]

    def start_send(self, message: Any, dest: int, tag: int) -> MPI.Request:
        return self.comm.Isend(message, dest, tag)

    def allgather(self, sendobj: Any) -> Any:
        self.calls["allgather"] += 1
        return self.comm.allgather(sendobj)

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.comm, name)

    def active(self) -> int:
        """Return how many requests have been neither waited for nor freed."""
        return sum(request != MPI.REQUEST_NULL for request in self.requests)


class Synchronous(Watched):
    """With synchronous sends, and random delays before sends and receives."""

    def __init__(self, comm: MPI.Intracomm, seed: int, longest: float) -> None:
        super().__init__(comm)
        self.random, self.longest = random.Random(f"{seed} {comm.rank}"), longest

    def dawdle(self) -> None:
        time.sleep(self.random.uniform(0, self.longest))

    def start_send(self, message: Any, dest: int, tag: int) -> MPI.Request:
        self.dawdle()
        return self.comm.Issend(message, dest, tag)


def nbytes(message: Any) -> int:
    """Return the size of an MPI message ``[array, MPI.BYTE]``."""
    array, datatype = message
    assert datatype == MPI.BYTE
    return int(array.nbytes)
