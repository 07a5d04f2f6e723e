"""What a rank has sent, and where its time went."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple


class Block(NamedTuple):
    """What is worked on, sent or awaited, in the words in which a person would ask for it.

    Attributes
    ----------
    kind : str
        With a place for the owner's number, if it has one.
    owner : int or None
        Whose it is.
    hop : int
        At which hop it arrives or, worked on, has arrived; 0 at home and where nothing goes round.
    source, dest : int or None
        From which rank it is awaited, or which one is to take it.
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
        """The owner's number, if the name has it."""
        return self.owner if "{}" in self.kind else None

    def __str__(self) -> str:
        """Say what is waited for."""
        what = f"{self.name} at hop {self.hop}" if self.hop else self.name
        if self.dest is not None:
            return f"rank {self.dest} to take {what}"
        return what if self.source is None else f"{what}, from rank {self.source}"


@dataclass
class Meter:
    """Counts one rank's blocks and seconds; hand it to any number of calls and it adds up.

    What it is told about blocks it leaves alone: that is for a `timeline.Timeline`.  It is told by
    functions, so that nothing is put into words where nobody reads them.

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

    def totals(self) -> "Meter":
        """Return the numbers alone."""
        return Meter(self.messages, self.bytes, self.computing, self.waiting)

    def begins(self, name: str) -> None:
        """Begin a pass."""

    def sent(self, nbytes: int, dest: int, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Count one block, which is about to be sent to `dest`; `what` says which."""
        self.messages += 1
        self.bytes += nbytes

    @contextmanager
    def computes(self, what: Callable[[], Block]) -> Iterator[None]:
        """Count the time within as computing; `what` says what is worked on."""
        start = perf_counter()
        yield
        self.computed_from(start, perf_counter(), what)

    @contextmanager
    def waits(self, what: Callable[[], Block]) -> Iterator[None]:
        """Count the time within as waiting; `what` says what for."""
        start = perf_counter()
        yield
        self.waited_from(start, perf_counter(), what)

    def computed_from(self, start: float, end: float, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Add a time of computing."""
        self.computing += end - start

    def waited_from(self, start: float, end: float, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Add a time of waiting."""
        self.waiting += end - start
