"""One line that follows the work on a terminal, one line a stage elsewhere."""

import os
import sys
import time

from mpi4py import MPI


class Progress:
    """Says on rank 0 what is going on; the other ranks are silent.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._speaks = comm.rank == 0
        # Under mpiexec stdout is a pipe even if it ends at a terminal: who starts it can tell.
        asked = os.environ.get("LVXATTN_PROGRESS")
        self._updates = asked == "line" if asked else sys.stdout.isatty()
        self._started = self._shown = time.perf_counter()
        self._stage = ""

    def start(self, stage: str) -> None:
        """Begin a stage, such as ``"reading frames"``."""
        self._stage, self._started, self._shown = stage, time.perf_counter(), 0.0
        if self._speaks and self._updates:
            print(f"\r\033[K{stage} ...", end="", flush=True)

    def update(self, done: int, total: int) -> None:
        """Say how far the stage is; at most ten times a second, on a terminal only."""
        now = time.perf_counter()
        if self._speaks and self._updates and now - self._shown > 0.1:
            self._shown = now
            bar = "#" * (24 * done // max(total, 1))
            print(f"\r\033[K{self._stage}  [{bar:<24}] {done:,}/{total:,}", end="", flush=True)

    def finish(self) -> None:
        """End the stage."""
        seconds = time.perf_counter() - self._started
        if self._speaks and self._updates:
            print("\r\033[K", end="", flush=True)
        elif self._speaks:
            print(f"{self._stage} ... {seconds:.1f} s", flush=True)

    def clear(self) -> None:
        """Wipe the updating line, so that an error has a line of its own."""
        if self._speaks and self._updates:
            print("\r\033[K", end="", flush=True)
