"""Who waits for whom: a watchdog that ends a run in which a block does not come.

``LVXATTN_TIMEOUT`` (seconds) arms it.  A wait for a block looks at the clock itself; while a rank
is in a collective call of MPI, a thread beside it does.  When the time is up it writes what the
rank waits for and the line it is at, leaves the others a moment to write theirs, and ends the run.
The rank that writes nothing is the one to look at.

    waiting  |---- LVXATTN_TIMEOUT ----| writes -- GRACE -- aborts all ranks

Unset, it does not exist.
"""

import os
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from mpi4py import MPI

from lvxattn.common.validation import check_seconds, on_rank

STATUS = 124
"""The exit status of a run that the watchdog ends, that of timeout(1)."""
GRACE = 2.0
"""Seconds between a rank's message and the end: the others' waits began a little later."""
# What starts a program, and is of no interest to whoever asks where it is.
_STARTERS = re.compile(r'File "(<frozen |.*/mpi4py/)')


class Pending(Protocol):
    """What may be waited for: a request, or what becomes one."""

    def Test(self) -> bool:
        """Tell whether it is done, and work on it."""


class Watchdog:
    """Watches one rank's waits.

    Parameters
    ----------
    comm : MPI.Intracomm
    seconds : float
        How long a rank may wait.
    """

    def __init__(self, comm: MPI.Intracomm, seconds: float) -> None:
        self.comm, self.seconds = comm, seconds
        self._spoken = False
        self._waiting: tuple[float, Callable[[], object], int] | None = None
        self._thread: threading.Thread | None = None
        self._ended: threading.Event | None = None

    @staticmethod
    def armed(comm: MPI.Intracomm) -> "Watchdog | None":
        """Return a watchdog if ``LVXATTN_TIMEOUT`` asks for one.

        Raises
        ------
        ValueError
            The variable is not a number of seconds.
        """
        seconds = timeout(comm)
        return None if seconds is None else Watchdog(comm, seconds)

    def check(self, waited: float, what: Callable[[], object]) -> None:
        """Look at a wait of this thread, which asks again and again; `what` says what for."""
        if waited < self.seconds:
            self._spoken = False
        elif not self._spoken:
            self._speak(what(), sys._getframe(1))
            self._spoken = True
        elif waited > self.seconds + GRACE:
            _end(self.comm)

    @contextmanager
    def over(self, what: Callable[[], object]) -> Iterator[None]:
        """Watch a call that does not return before it is done; `what` says what for."""
        if self._thread is None:
            # It must not keep the watchdog alive: a pass that ends early drops it.
            self._ended = threading.Event()
            watch = weakref.ref(self), self._ended, min(0.25, self.seconds / 10)
            self._thread = threading.Thread(target=_watch, args=watch, daemon=True)
            self._thread.start()
        self._waiting = time.monotonic(), what, threading.get_ident()
        try:
            yield
        finally:
            self._waiting = None

    def stop(self) -> None:
        """End the thread, if there is one."""
        if self._ended is not None:
            self._ended.set()

    def look(self) -> None:
        """End the run if the wait has lasted too long."""
        waiting = self._waiting
        if waiting is None or time.monotonic() - waiting[0] < self.seconds:
            return
        _, what, thread = waiting
        self._speak(what(), sys._current_frames()[thread])
        time.sleep(GRACE)
        if self._waiting is waiting:  # else what it waited for has come after all
            _end(self.comm)

    def _speak(self, what: object, frame: FrameType) -> None:
        stack = [line for line in traceback.format_stack(frame) if not _STARTERS.search(line)]
        where = f"rank {self.comm.rank} of {self.comm.size}"
        message = f"{where} has waited {self.seconds:g} s for {what}; it is at\n{''.join(stack)}"
        os.write(2, message.encode())  # at once, so that ranks do not write into each other's lines


def wait(request: Pending, watchdog: Watchdog | None, what: Callable[[], object]) -> None:
    """Wait for a request; asleep, if it takes longer than a moment.

    A wait inside MPI spins: where ranks outnumber cores it takes a core from the very ranks that it
    waits for.  This one gives its core to whoever can use it, from the first moment.  A pause is a
    twentieth of the wait so far, so that it adds little to it, and at most 1 ms, because MPI moves
    nothing meanwhile.

    Parameters
    ----------
    request : MPI.Request, or what becomes one
    watchdog : Watchdog or None
        Ends the run should the wait take too long.
    what : callable
        Says what is waited for, if that is ever asked.
    """
    start = time.perf_counter()
    while not request.Test():
        waited = time.perf_counter() - start
        if waited > 1e-3:
            if watchdog is not None:
                watchdog.check(waited, what)
            time.sleep(min(1e-3, waited / 20))
        else:
            os.sched_yield()


@contextmanager
def watching(comm: MPI.Intracomm, what: str, seconds: float | None = None) -> Iterator[None]:
    """Watch one wait, of `seconds` at most if ``LVXATTN_TIMEOUT`` says nothing else."""
    seconds = timeout(comm) or seconds
    if seconds is None:
        yield
        return
    watchdog = Watchdog(comm, seconds)
    try:
        with watchdog.over(lambda: what):
            yield
    finally:
        watchdog.stop()


def timeout(comm: MPI.Intracomm) -> float | None:
    """Return the seconds that ``LVXATTN_TIMEOUT`` allows, if it is set.

    Raises
    ------
    ValueError
        It is not a number of seconds.
    """
    try:
        return check_seconds("LVXATTN_TIMEOUT", os.environ.get("LVXATTN_TIMEOUT"))
    except ValueError as error:
        raise on_rank(error, comm.rank, comm.size) from None


def _watch(watchdog: "weakref.ref[Watchdog]", ended: threading.Event, interval: float) -> None:
    while not ended.wait(interval):
        alive = watchdog()
        if alive is None:
            return
        alive.look()
        del alive


def _end(comm: MPI.Intracomm) -> None:
    """End all ranks: by MPI where it may be called from this thread, else by this rank's end."""
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        killer = threading.Thread(target=comm.Abort, args=(STATUS,), daemon=True)
        killer.start()
        killer.join(GRACE)  # an abort that hangs, or returns, is followed by the plain end
    os._exit(STATUS)
