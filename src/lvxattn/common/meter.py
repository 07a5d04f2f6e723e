"""Counters of one rank's messages, bytes and seconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple


class Block(NamedTuple):
    """A block that is computed with, sent or awaited, as messages name it.

    Attributes
    ----------
    kind : str
        With "{}" for the owner's rank, if it has one.
    owner : int or None
        The rank that it belongs to.
    hop : int
        The hop at which it arrives or has arrived; 0 at home and where there is no ring.
    source, dest : int or None
        The rank that it is awaited from, or sent to.
    """

    kind: str
    owner: int | None = None
    hop: int = 0
    source: int | None = None
    dest: int | None = None

    @property
    def name(self) -> str:
        """Kind and owner."""
        return self.kind.format(self.owner)

    @property
    def whose(self) -> int | None:
        """The owner's rank, if the name contains it."""
        return self.owner if "{}" in self.kind else None

    def __str__(self) -> str:
        """Return the name, hop and source or destination."""
        what = f"{self.name} at hop {self.hop}" if self.hop else self.name
        if self.dest is not None:
            return f"rank {self.dest} to take {what}"
        return what if self.source is None else f"{what}, from rank {self.source}"


@dataclass
class Meter:
    """Counts one rank's messages, bytes and seconds, over any number of calls.

    Descriptions of blocks are used by `timeline.Timeline` only.  They are passed as functions, so
    that nothing is formatted where it is not read.

    Attributes
    ----------
    messages, bytes : int
        Blocks sent by this rank, and the size of their arrays.
    computing, waiting : float
        Seconds in local attention, and seconds spent waiting for a block.  On an asynchronous
        device such as a GPU, computing is the time that it takes to launch the work.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import Meter, cross_attention, run_ranks
    >>> meters = [Meter(), Meter()]
    >>> x = np.ones((1, 1, 3, 4))  # 3 queries, keys and values on each of 2 ranks
    >>> _ = run_ranks(2, lambda comm: cross_attention(x, x, x, comm, meter=meters[comm.rank]))
    >>> meters[0].messages, meters[0].bytes  # q, then out, top and total of the other rank
    (2, 240)
    """

    messages: int = 0
    bytes: int = 0
    computing: float = 0.0
    waiting: float = 0.0

    def totals(self) -> "Meter":
        """Return a copy of the numbers, without a timeline."""
        return Meter(self.messages, self.bytes, self.computing, self.waiting)

    def begins(self, name: str) -> None:
        """Begin a pass."""

    def sent(self, nbytes: int, dest: int, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Count one block about to be sent to `dest`; `what` returns its description."""
        self.messages += 1
        self.bytes += nbytes

    @contextmanager
    def computes(self, what: Callable[[], Block]) -> Iterator[None]:
        """Count the time within as computing; `what` returns the block computed with."""
        start = perf_counter()
        yield
        self.computed_from(start, perf_counter(), what)

    @contextmanager
    def waits(self, what: Callable[[], Block]) -> Iterator[None]:
        """Count the time within as waiting; `what` returns the block awaited."""
        start = perf_counter()
        yield
        self.waited_from(start, perf_counter(), what)

    def computed_from(self, start: float, end: float, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Add a time of computing."""
        self.computing += end - start

    def waited_from(self, start: float, end: float, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Add a time of waiting."""
        self.waiting += end - start
