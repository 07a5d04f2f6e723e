"""Calls with a time limit.

A function runs in a thread of its own.  One that does not come back in time is interrupted, as far
as Python can: a loop ends, a wait in a library does not, and its thread is left behind, which keeps
no program from ending.  A library that computes without ever releasing Python's lock stops the
clock, too.

    call  --work-->  the thread          settings of contextvars, such as NumPy's error state, are
          <-answer-  of all calls        copied for each call: what fn sets ends with it
"""

import contextvars
import ctypes
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENT = 3  # late calls
_JOIN = 0.5  # seconds that an interrupted call has to end


class TimeIsUpError(Exception):
    """A call did not come back in time."""


class EndedError(Exception):
    """A call raised what would end the program, such as SystemExit: the cause of this."""


class _Interrupt(BaseException):
    """Raised inside a call that is to end."""


class TimeLimit:
    """A thread that calls functions, one at a time; a new one after one that did not come back.

    Parameters
    ----------
    seconds : float
        How long a call may take; after three that took longer, a tenth of that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.late = 0  # calls that did not come back in time
        self.abandoned = 0  # calls that still run
        self._thread: threading.Thread | None = None
        self._waiting = False  # for an answer
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def call(self, fn: Callable[[], T]) -> T:
        """Return what fn returns, or raise what it raises.

        Raises
        ------
        TimeIsUpError
        EndedError
            fn raised something that is no Exception.
        """
        seconds = self.seconds if self.late < _PATIENT else self.seconds / 10
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                answers.put((True, context.run(fn)))
            except BaseException as error:
                answers.put((False, error))

        if self._thread is None:
            self._calls = queue.SimpleQueue()
            self._thread = threading.Thread(target=_serve, args=(self._calls,), daemon=True)
            self._thread.start()
        self._calls.put(work)
        self._waiting = True
        try:
            succeeded, answer = answers.get(timeout=min(seconds, threading.TIMEOUT_MAX))
        except queue.Empty:
            self.late += 1
            self._give_up()
            raise TimeIsUpError(f"did not come back within {seconds:g} s") from None
        self._waiting = False
        if succeeded:
            result: T = answer
            return result
        if isinstance(answer, Exception):
            raise answer
        raise EndedError(f"raised {type(answer).__name__}") from answer

    def close(self) -> None:
        """End the thread, and the call that the user's Ctrl-C may have left in it."""
        if self._waiting:
            self._give_up()
        elif self._thread is not None:
            self._calls.put(None)
        self._thread = None

    def _give_up(self) -> None:
        thread = self._thread
        assert thread is not None
        # Before the thread is told to end: its number could be another's by then.
        interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
        interrupt(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Interrupt))
        self._calls.put(None)  # if it ever comes back
        self._thread, self._waiting = None, False
        thread.join(_JOIN)
        self.abandoned += thread.is_alive()


def _serve(calls: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while True:
        try:
            work = calls.get()
            if work is None:
                return
            work()
            del work  # and with it the call's arrays, while this waits
        except _Interrupt:
            return
