"""A watchdog that ends a run in which a rank waits too long, and reports what each rank waits for.

``LVXATTN_TIMEOUT`` (seconds) enables it.  A wait for a block checks the time itself; during a
collective call of MPI a thread does.  After the timeout the watchdog prints what the rank waits for
and its traceback, gives the other ranks a moment to print theirs, and ends the run.  The rank that
prints nothing is the cause.

    waiting  |---- LVXATTN_TIMEOUT ----| prints -- GRACE -- aborts all ranks

A stopped rank of the same host is named outright.  Between hosts each rank that is about to end the
run tells all others so, by an empty message, and names those from which none comes.
"""

import os
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

import numpy as np
from mpi4py import MPI

from lvxattn.common.meter import Block, with_hosts
from lvxattn.common.processes import stopped
from lvxattn.common.validation import check_seconds, on_rank

from .death_notice import end_unannounced

STATUS = 124
"""The exit status of a run that the watchdog ends, as of timeout(1)."""
GRACE = 2.0
"""Seconds between a rank's message and the end, as the other ranks began to wait later."""
_ENDS_TOO = 7005
"""Tag of the empty messages by which ranks of several hosts learn which of them do not answer."""
# Frames of a traceback that only start the program.
_STARTERS = re.compile(r'File "(<frozen |.*/mpi4py/)')


class Pending(Protocol):
    """A request, or an object that becomes one."""

    def Test(self) -> bool:
        """Return whether it is complete, and let it progress."""


class Watchdog:
    """Limits the time that one rank waits.

    Parameters
    ----------
    comm : MPI.Intracomm
    seconds : float
        The longest time that a rank may wait.
    hosts : sequence of str
        The host of each rank, as far as known.
    """

    def __init__(self, comm: MPI.Intracomm, seconds: float, hosts: Sequence[str] = ()) -> None:
        self.comm, self.seconds, self.hosts = comm, seconds, hosts
        self._spoken = False
        self._waiting: tuple[float, Callable[[], object], int] | None = None
        self._thread: threading.Thread | None = None
        self._ended: threading.Event | None = None

    @staticmethod
    def armed(comm: MPI.Intracomm, hosts: Sequence[str] = ()) -> "Watchdog | None":
        """Return a watchdog if ``LVXATTN_TIMEOUT`` is set.

        Raises
        ------
        ValueError
            The variable is not a number of seconds.
        """
        seconds = timeout(comm)
        return None if seconds is None else Watchdog(comm, seconds, hosts)

    def check(self, waited: float, what: Callable[[], object]) -> None:
        """Check a wait of this thread, again and again; `what` returns what is awaited."""
        if waited < self.seconds:
            self._spoken = False
        elif not self._spoken:
            self._speak(what(), sys._getframe(1))
            self._spoken = True
        elif waited > self.seconds + GRACE:
            self._blame()
            _end(self.comm)

    @contextmanager
    def over(self, what: Callable[[], object]) -> Iterator[None]:
        """Watch a blocking call; `what` returns what is awaited."""
        if self._thread is None:
            # It must not keep the watchdog alive, which a failed call drops.
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
        if self._waiting is waiting:  # else the wait has ended
            self._blame()
            _end(self.comm)

    def _speak(self, what: object, frame: FrameType) -> None:
        stack = [line for line in traceback.format_stack(frame) if not _STARTERS.search(line)]
        where = f"rank {self.comm.rank} of {self.comm.size}"
        awaited = with_hosts(what, self.hosts)
        message = f"{where} has waited {self.seconds:g} s for {awaited}; it is at\n{''.join(stack)}"
        if cause := stopped():
            message += f"{cause}\n"
        os.write(2, message.encode())  # in one call, so that the lines of ranks do not mix

    def _blame(self) -> None:
        """Name the ranks that do not end the run, too, where there are several hosts.

        Not before the end is certain: to a run that goes on, nobody would receive the messages.
        """
        if len({*self.hosts}) < 2 or MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            return
        silent = {*range(self.comm.size)} - {self.comm.rank}

        def exchange() -> None:
            for rank in sorted(silent):
                with suppress(MPI.Exception):  # from a lost rank
                    self.comm.Isend([b"", MPI.BYTE], rank, _ENDS_TOO).Free()
            limit = time.monotonic() + GRACE
            while silent and time.monotonic() < limit:
                for rank in sorted(silent):
                    with suppress(MPI.Exception):
                        if self.comm.Iprobe(rank, _ENDS_TOO):
                            silent.discard(rank)
                time.sleep(0.01)

        if _in_time(exchange, 2 * GRACE) and silent:
            names = ", ".join(f"rank {r} on {self.hosts[r]}" for r in sorted(silent))
            why = f"lost, busy, or waiting for less than {self.seconds:g} s"
            line = f"rank {self.comm.rank} of {self.comm.size}: no answer from {names}: {why}\n"
            os.write(2, line.encode())


def wait(request: Pending, watchdog: Watchdog | None, what: Callable[[], object]) -> None:
    """Wait for a request; asleep, if it takes longer than 1 ms.

    A wait inside MPI spins: where there are more ranks than cores, it takes a core from the ranks
    that it waits for.  This one yields its core from the start.  A pause is a twentieth of the wait
    so far, so that it adds little to it, and at most 1 ms, as MPI makes no progress meanwhile.

    Parameters
    ----------
    request : MPI.Request, or an object that becomes one
    watchdog : Watchdog or None
        Ends the run if the wait takes too long.
    what : callable
        Returns what is awaited, for the watchdog's message.
    """
    start = time.perf_counter()
    with _noted(what):
        while not request.Test():
            waited = time.perf_counter() - start
            if waited > 1e-3:
                if watchdog is not None:
                    watchdog.check(waited, what)
                time.sleep(min(1e-3, waited / 20))
            else:
                os.sched_yield()


def any_rank(comm: MPI.Intracomm, here: bool, what: str) -> bool:
    """Return whether something is true on any rank.

    Collective: every rank of comm calls this.  Unlike a blocking call of MPI it yields its core:
    four ranks on two cores agree in half the time.

    Parameters
    ----------
    comm : MPI.Intracomm
    here : bool
        Whether it is true on this rank.
    what : str
        What is awaited, for the watchdog's message.
    """
    mine, found = np.array([here], np.uint8), np.empty(1, np.uint8)
    wait(comm.Iallreduce(mine, found, op=MPI.MAX), Watchdog.armed(comm), lambda: what)
    return bool(found[0])


@contextmanager
def watching(
    comm: MPI.Intracomm, what: str, seconds: float | None = None, hosts: Sequence[str] = ()
) -> Iterator[None]:
    """Watch one wait, for at most ``LVXATTN_TIMEOUT`` or, if that is not set, `seconds`."""
    seconds = timeout(comm) or seconds
    with _noted(lambda: what):
        if seconds is None:
            yield
            return
        watchdog = Watchdog(comm, seconds, hosts)
        try:
            with watchdog.over(lambda: what):
                yield
        finally:
            watchdog.stop()


def timeout(comm: MPI.Intracomm) -> float | None:
    """Return ``LVXATTN_TIMEOUT`` in seconds, if it is set.

    Raises
    ------
    ValueError
        It is not a number of seconds.
    """
    try:
        return check_seconds("LVXATTN_TIMEOUT", os.environ.get("LVXATTN_TIMEOUT"))
    except ValueError as error:
        raise on_rank(error, comm.rank, comm.size) from None


@contextmanager
def _noted(what: Callable[[], object]) -> Iterator[None]:
    """Add a note of what was awaited to an exception of MPI."""
    try:
        yield
    except MPI.Exception as error:
        awaited = what()
        peer = awaited.peer if isinstance(awaited, Block) else None
        who = "one of them" if peer is None else f"rank {peer}"
        error.add_note(f"while waiting for {awaited}: {who} may have ended")
        raise


def _watch(watchdog: "weakref.ref[Watchdog]", ended: threading.Event, interval: float) -> None:
    while not ended.wait(interval):
        alive = watchdog()
        if alive is None:
            return
        alive.look()
        del alive


def _end(comm: MPI.Intracomm) -> None:
    """End all ranks: by MPI where this thread may call it, else by ending this process."""
    end_unannounced()  # this rank is not the cause
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        _in_time(lambda: comm.Abort(STATUS), GRACE)
    os._exit(STATUS)


def _in_time(call: Callable[[], object], seconds: float) -> bool:
    """Call MPI, which may hang or return, from a thread; return whether it has returned in time."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
