"""Call a function in this process: one that no other process can import.

It can end the check, and one that never releases Python's lock stops its clock.  So each case is
shown before it is called, in a line that the next one replaces, and stacks are written to stderr if
a call crashes, or takes longer than the clock allows.
"""

import faulthandler
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from operator import call
from typing import Any

import numpy.typing as npt

from lvxattn.check.callers.kernel import Kernel
from lvxattn.check.case_arrays import Problem
from lvxattn.check.shards import Cut
from lvxattn.check.surroundings import restore
from lvxattn.check.time_limit import LONGEST, TimeLimit

Array = npt.NDArray[Any]

_LATE = 2.0  # seconds after the time limit, in which Python interrupts a call
_SEND = 0.02  # seconds in which ZeroMQ's thread sends a line; nothing tells when it has


class ThisProcess:
    """A function in a thread of this process, or on virtual ranks that have threads of their own.

    Parameters
    ----------
    kernel : Kernel
    seconds : float
        The limit of a call; after three that exceeded it, a tenth of that.
    ranks : int
        Number of virtual ranks, or 0.
    """

    ending = ""  # it does not end

    def __init__(self, kernel: Kernel, seconds: float, ranks: int) -> None:
        self._kernel, self._timer, self._show = kernel, TimeLimit(seconds), _line()
        self._run: Callable[..., dict[str, Array]] = call if ranks else self._timer.call
        self.own_backward, self.look_back = kernel.own_backward, kernel.look_back

    @property
    def abandoned(self) -> int:
        """The number of calls that could not be ended."""
        return self._timer.abandoned

    def call(
        self, problem: Problem, notes: list[str] | None = None, cut: Cut | None = None
    ) -> dict[str, Array]:
        """Call the function; `Kernel.call` and `TimeLimit.call` document results and errors."""
        where = f", {cut}" if cut else ""
        self._show(
            f"lvxattn check: {problem.case.name}, {problem.dtype}, seed {problem.seed}{where}"
        )
        with _stack_after(self._timer.limit + _LATE):
            return self._run(partial(self._kernel.call, problem, notes, cut))

    def close(self) -> None:
        """End the threads, and restore what an abandoned call has changed."""
        self._timer.close()
        self._kernel.close()
        restore()
        self._show("")


@contextmanager
def _stack_after(seconds: float) -> Iterator[None]:
    """Write stacks to stderr if this crashes or takes so long; neither needs Python's lock."""
    # In a notebook, that of the server: the kernel's own is read by the kernel.
    fd: Any = getattr(sys.stderr, "_original_stdstream_copy", None) or sys.__stderr__
    ours = not faulthandler.is_enabled()
    with suppress(ValueError, RuntimeError, AttributeError):  # it has none
        if ours:
            faulthandler.enable(fd)
        faulthandler.dump_traceback_later(min(seconds, LONGEST), file=fd)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if ours:
            faulthandler.disable()


def _line() -> Callable[[str], None]:
    """Return a function that shows a line instead of the last that it has shown."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(shell, "kernel"):
        handle = import_module("IPython.display").display(
            {"text/plain": ""}, raw=True, display_id=True
        )

        def update(text: str) -> None:
            handle.update({"text/plain": text}, raw=True)
            for stream in (sys.stdout, sys.stderr):  # waits until ZeroMQ has it
                stream.flush()
            time.sleep(_SEND)

        return update
    width = 0

    def write(text: str) -> None:
        nonlocal width
        if sys.stderr is not None and (text or width):
            sys.stderr.write(f"\r{text:{width}}" if text else f"\r{'':{width}}\r")
            sys.stderr.flush()
        width = len(text)

    return write
