"""Requests to MPI that wait for their buffers before they are made.

The host does not wait for a device: it asks now and then whether the event of a buffer (`buffers`)
has passed, and makes the request then.  Whoever waits for one request asks for the others too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mpi4py import MPI

# Asks whether a use of a buffer is over; never waits.
Ready = Callable[[], bool]


class Transfer:
    """A request to MPI that is made when buffers are ready for it.

    Parameters
    ----------
    start : callable
        Makes the request.
    *ready : callable
        All are true from some moment on.

    Attributes
    ----------
    request : MPI.Request
        REQUEST_NULL until it is made, and when it is done.
    """

    def __init__(self, start: Callable[[], MPI.Request], *ready: Ready) -> None:
        self.request, self._ready = MPI.Request(), ready
        self._start: Callable[[], MPI.Request] | None = start
        self.begin()

    def begin(self) -> None:
        """Make the request if that has become possible."""
        if self._start is not None and all(ready() for ready in self._ready):
            self.request, self._start = self._start(), None

    def Test(self) -> bool:
        """Tell whether it is done, as requests do."""
        self.begin()
        return self._start is None and self.request.Test()

    @staticmethod
    def nothing() -> "Transfer":
        """Return one that is done."""
        return Transfer(MPI.Request)


class Waited(NamedTuple):
    """What a rank waits for, while it makes its other requests too.

    Another rank may be waiting for one of these, and this one for that rank.
    """

    transfer: Transfer
    begin_others: Callable[[], None]

    def Test(self) -> bool:
        """Tell whether it is done, as requests do."""
        self.begin_others()
        return self.transfer.Test()


class Transfers(NamedTuple):
    """Several, in any order."""

    transfers: Sequence[Transfer]

    def Test(self) -> bool:
        """Tell whether all are done, as requests do."""
        # All are asked, whatever the first one says: another rank may wait for any of them.
        return sum(not transfer.Test() for transfer in self.transfers) == 0
