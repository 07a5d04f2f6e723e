"""The ranks of a run: an MPI communicator, by the names that the shared program uses."""

import os
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from lvxattn.common.launcher import claim
from lvxattn.mpi_impl.commands.run.backend import Backend, choose_backend
from lvxattn.mpi_impl.transport.device import limit_blas_threads
from lvxattn.mpi_impl.transport.watchdog import wait, watching

T = TypeVar("T")

_NUMBERS = 7003


class MPIRanks:
    """The ranks of a communicator, seen from one of them; `lvxattn.cli.run_ranks.Ranks`.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
    rank, size : int
    launched : bool
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.launched = claim(os.environ) is not None

    def allgather(self, sendobj: T) -> list[T]:
        """Give every rank the objects of all ranks.  Collective: every rank calls this."""
        return self.comm.allgather(sendobj)

    def limit_threads(self) -> int:
        """Share out the cores.  Collective: every rank calls this."""
        return limit_blas_threads(self.comm)

    def backend(self, wish: str, dtype: str) -> Backend:
        """Choose NumPy or CuPy.  Collective: every rank calls this."""
        return choose_backend(wish, dtype, self.comm)

    def start_together(self) -> None:
        """Wait for all ranks.  Collective: every rank calls this."""
        with self.watching("all ranks to start"):
            self.comm.Barrier()

    def send(self, number: float, dest: int) -> None:
        """Send a number to a rank that calls `receive`."""
        self.comm.Send(np.array([number]), dest, _NUMBERS)

    def receive(self, source: int) -> float:
        """Wait for a number from a rank that calls `send`; asleep, if it takes long."""
        room = np.empty(1)
        wait(self.comm.Irecv(room, source, _NUMBERS), None, lambda: "a number")
        return float(room[0])

    def watching(self, what: str) -> AbstractContextManager[None]:
        """Watch one wait, if ``LVXATTN_TIMEOUT`` asks for it."""
        return watching(self.comm, what)
