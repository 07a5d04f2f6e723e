"""The processes started by mpiexec."""

import sys
import time
from typing import Any

from mpi4py import MPI

from lvxattn.check.ranks.processes import Processes


class MPIProcesses(Processes):
    """The ranks of MPI.COMM_WORLD; the function gets communicators split from it."""

    def __init__(self, time_limit: float) -> None:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError(
                "ranks: expected an MPI with thread support MPI_THREAD_MULTIPLE (the function runs "
                f"in a thread that can be given up), got level {MPI.Query_thread()}"
            )
        self._channel = MPI.COMM_WORLD.Dup()
        self._under_way: list[MPI.Request] = []
        super().__init__(self._channel.rank, self._channel.size, time_limit)

    def close(self) -> None:
        """Free the channel too.  Collective: every rank calls this."""
        super().close()
        MPI.Request.waitall(self._under_way)
        self._channel.Free()

    def _send(self, message: Any, dest: int, tag: int) -> None:
        self._under_way = [request for request in self._under_way if not request.Test()]
        self._under_way.append(self._channel.isend(message, dest, tag))

    def _arrived(self, source: int, tag: int) -> bool:
        return self._channel.iprobe(source, tag)

    def _take(self, source: int, tag: int) -> Any:
        return self._channel.recv(source=source, tag=tag)

    def _split(self, group: tuple[int, ...]) -> Any:
        if self.rank not in group:
            return self._channel.Split(MPI.UNDEFINED)
        return self._channel.Split(0, group.index(self.rank))

    def _free(self, comm: Any) -> None:
        if comm != MPI.COMM_NULL:
            comm.Free()

    def _abort(self) -> None:
        sys.stdout.flush()
        time.sleep(0.5)  # the launcher drops output that it has not read yet
        MPI.COMM_WORLD.Abort(1)
