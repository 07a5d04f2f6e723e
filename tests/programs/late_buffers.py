"""Blocks that skip ranks, sent from buffers that a device has not finished with on rank 1.

Buffers keep `DeviceBuffer`'s contract on host memory: one that was filled may be sent 0.2 s later,
one that was received at once.  Rank 0 prints, as JSON, by rank how far results are from those
without delay, and how many buffers a rotation had at most.
"""

import json
import sys
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.common.segments import Causal
from lvxattn.mpi_impl import cross_attention, cross_attention_backward, exchange
from lvxattn.mpi_impl.transport import buffers

comm = MPI.COMM_WORLD
DELAY = 0.2 if comm.rank == 1 else 0.0  # seconds
most = 0


class LateBuffer(buffers.HostBuffer):
    """Is ready a while after it was filled."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.due, self.lent = 0.0, False

    def filled(self) -> None:
        self.due, self.lent = time.monotonic() + DELAY, False

    def sendable(self, nbytes: int) -> tuple[Any, Any]:
        due = 0.0 if self.lent else self.due
        return self.array[:nbytes], lambda: time.monotonic() >= due

    def receivable(self, nbytes: int) -> tuple[Any, Any]:
        self.lent = False
        return self.array[:nbytes], lambda: True

    def deliver(self, nbytes: int) -> None:
        self.lent = True


class Counting(exchange.Exchange):
    """Counts buffers at the end."""

    def finish(self) -> None:
        global most
        most = max(most, *(len(rotation.buffers) for rotation in self.rotations))
        super().finish()


def passes() -> list[Any]:
    """Run a forward and a backward."""
    q, k, v = np.random.default_rng(comm.rank).standard_normal((3, 1, 1, 16, 8))
    options: dict[str, Any] = {"schedule": sys.argv[1], "mask": Causal()}
    out, lse = cross_attention(q, k, v, comm, **options)
    return [out, *cross_attention_backward(out, q, k, v, out, lse, comm, **options)]


at_once = passes()
buffers.buffer = lambda xp, nbytes, *, direct=True: LateBuffer(nbytes)
sys.modules["lvxattn.mpi_impl.cross_attention"].Exchange = Counting  # type: ignore[attr-defined]
late = passes()
apart = max(float(abs(a - b).max()) for a, b in zip(late, at_once, strict=True))
found = comm.gather((apart, most))
if comm.rank == 0:
    json.dump(found, sys.stdout)
