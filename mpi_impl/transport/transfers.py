"""MPI requests that start once their buffers are ready.

The host does not wait for a device: it checks now and then whether the event of a buffer (see
`buffers`) has passed, and then starts the request.  While it waits for one request, it checks the
others too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mpi4py import MPI

# Returns whether a use of a buffer is complete, without waiting.
Ready = Callable[[], bool]


class Transfer:
    """An MPI request that starts when its buffers are ready.

    Parameters
    ----------
    start : callable
        Starts the request and returns it.
    *ready : callable
        Return whether the buffers are ready, and stay true.

    Attributes
    ----------
    request : MPI.Request
        REQUEST_NULL until it has started, and after it has completed.
    """

    def __init__(self, start: Callable[[], MPI.Request], *ready: Ready) -> None:
        self.request, self._ready = MPI.Request(), ready
        self._start: Callable[[], MPI.Request] | None = start
        self.begin()

    @property
    def begun(self) -> bool:
        """Whether the request has started."""
        return self._start is None

    def begin(self) -> None:
        """Start the request if its buffers have become ready."""
        if self._start is not None and all(ready() for ready in self._ready):
            self.request, self._start = self._start(), None

    def Test(self) -> bool:
        """Return whether it is complete, like a request's `Test`."""
        self.begin()
        return self._start is None and self.request.Test()

    @staticmethod
    def nothing() -> "Transfer":
        """Return a transfer that is complete."""
        return Transfer(MPI.Request)


class Waited(NamedTuple):
    """A transfer that a rank waits for, while it starts its other requests too.

    Otherwise two ranks might each wait for a request that the other has not started.
    """

    transfer: Transfer
    begin_others: Callable[[], None]

    def Test(self) -> bool:
        """Return whether it is complete, like a request's `Test`."""
        self.begin_others()
        return self.transfer.Test()


class Transfers(NamedTuple):
    """Several transfers, which may complete in any order."""

    transfers: Sequence[Transfer]

    def Test(self) -> bool:
        """Return whether all are complete, like a request's `Test`."""
        # Test all of them, complete or not: another rank may wait for any.
        return sum(not transfer.Test() for transfer in self.transfers) == 0
