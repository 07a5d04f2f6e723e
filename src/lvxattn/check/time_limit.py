"""Calls with a time limit.

A function runs in a thread of its own.  One that does not return in time is interrupted, as far as
Python can: a loop ends; a wait inside a library does not, and its daemon thread is abandoned.  A
library that never releases Python's lock stops the clock, too.

    call  --work-->  the thread          settings of contextvars, such as NumPy's error state, are
          <-answer-  of all calls        copied for each call: changes by fn end with it
"""

import contextvars
import ctypes
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST = 1e6  # seconds: what the system's calls can wait
_LATE = 3  # calls, after which the limit is shortened
_JOIN = 0.5  # seconds that an interrupted call has to end


class TimeIsUpError(Exception):
    """A call did not return in time."""


class EndedError(Exception):
    """A call raised something that ends a program, such as SystemExit: this error's cause."""


class _Interrupt(BaseException):
    """Raised inside a call to end it."""


def shortened(seconds: float, late: int) -> float:
    """Return the limit of the next call, after a number of calls that exceeded theirs."""
    return seconds if late < _LATE else seconds / 10


class TimeLimit:
    """A thread that calls functions, one at a time; replaced after a call that does not return.

    Parameters
    ----------
    seconds : float
        The limit of a call; after three that exceeded it, a tenth of that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.late = 0  # calls that did not return in time
        self.abandoned = 0  # calls that are still running
        self._thread: threading.Thread | None = None
        self._waiting = False  # for an answer
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    @property
    def limit(self) -> float:
        """Seconds that the next call has."""
        return shortened(self.seconds, self.late)

    def call(self, fn: Callable[[], T]) -> T:
        """Return what fn returns, or raise what it raises.

        Raises
        ------
        TimeIsUpError
        EndedError
            fn raised a BaseException that is no Exception.
        """
        seconds = self.limit
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
            succeeded, answer = answers.get(timeout=min(seconds, LONGEST))
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
        """End the thread, and a call left in it by the user's Ctrl-C."""
        if self._waiting:
            self._give_up()
        elif self._thread is not None:
            self._calls.put(None)
        self._thread = None

    def _give_up(self) -> None:
        thread = self._thread
        assert thread is not None
        # Before the thread is told to end: afterwards its id may be another's.
        interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
        interrupt(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Interrupt))
        self._calls.put(None)  # if it ever returns
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
