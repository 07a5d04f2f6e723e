"""What a rank has sent, and where its time went."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class Meter:
    """Counts one rank's blocks and seconds; hand it to any number of calls and it adds up.

    Attributes
    ----------
    messages, bytes : int
        Sent by this rank: blocks, and the size of their arrays.
    computing, waiting : float
        Seconds in local attention, and seconds in which nothing else was left to do than to wait
        for a block.  On a device that works behind the program's back, as a GPU does, computing is
        the time that it takes to hand the work over.
    """

    messages: int = 0
    bytes: int = 0
    computing: float = 0.0
    waiting: float = 0.0

    def sent(self, nbytes: int) -> None:
        """Count one block."""
        self.messages += 1
        self.bytes += nbytes

    def computes(self, fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return `fn` so that its calls count as computing."""

        def timed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            start = perf_counter()
            result = fn(*args, **kwargs)
            self.computing += perf_counter() - start
            return result

        return timed

    def waits(self, fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return `fn` so that its calls count as waiting."""

        def timed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            start = perf_counter()
            result = fn(*args, **kwargs)
            self.waiting += perf_counter() - start
            return result

        return timed
