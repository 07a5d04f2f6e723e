"""Count the messages, bytes and seconds of one rank."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple


class Block(NamedTuple):
    """A block that is computed with, sent or awaited, for reports and error messages.

    Attributes
    ----------
    kind : str
        Name of its kind, with ``{}`` for the owner if it has one.
    owner : int or None
    hop : int
        The hop of the ring at which it arrives or has arrived; 0 at home and without a ring.
    source, dest : int or None
        The rank from which it is awaited, or which is to receive it.

    Examples
    --------
    >>> print(Block("the queries of rank {}", owner=2, hop=1, source=3))
    the queries of rank 2 at hop 1, from rank 3
    """

    kind: str
    owner: int | None = None
    hop: int = 0
    source: int | None = None
    dest: int | None = None

    @property
    def name(self) -> str:
        """Its kind, with the owner."""
        return self.kind.format(self.owner)

    @property
    def whose(self) -> int | None:
        """The owner, if its kind has one."""
        return self.owner if "{}" in self.kind else None

    @property
    def peer(self) -> int | None:
        """The rank that is awaited, if there is one."""
        return self.source if self.dest is None else self.dest

    def __str__(self) -> str:
        """Format as the object of a wait."""
        what = f"{self.name} at hop {self.hop}" if self.hop else self.name
        if self.dest is not None:
            return f"rank {self.dest} to take {what}"
        return what if self.source is None else f"{what}, from rank {self.source}"


def with_hosts(what: object, hosts: Sequence[str]) -> str:
    """Format what is awaited, with the host of the awaited rank, or of all, if there are several.

    Parameters
    ----------
    what : Block or object
    hosts : sequence of str
        By rank; may be empty.

    Examples
    --------
    >>> print(with_hosts(Block("the queries of rank {}", owner=2, source=3), ["a", "a", "b", "b"]))
    the queries of rank 2, from rank 3 (rank 3 is on b)
    >>> print(with_hosts("all ranks to start", ["a", "b", "a", "b"]))
    all ranks to start (ranks 0, 2 are on a; 1, 3 on b)
    """
    names = list(dict.fromkeys(hosts))
    if len(names) < 2:
        return str(what)
    if isinstance(what, Block) and what.peer is not None:
        return f"{what} (rank {what.peer} is on {hosts[what.peer]})"
    ranks = [", ".join(str(r) for r, host in enumerate(hosts) if host == name) for name in names]
    others = "".join(f"; {r} on {name}" for r, name in zip(ranks[1:], names[1:], strict=True))
    return f"{what} (ranks {ranks[0]} are on {names[0]}{others})"


@dataclass
class Meter:
    """Totals of one rank over any number of calls.

    Its methods take functions that return blocks, so that a block is described only if needed, as
    by `timeline.Timeline`.

    Attributes
    ----------
    messages, bytes : int
        Blocks sent by this rank, and the size of their arrays.
    computing, waiting : float
        Seconds in local attention, and seconds waiting for blocks.  On an asynchronous device, such
        as a GPU, computing is the time to launch the work.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import Meter, cross_attention, run_ranks, shard
    >>> q, kv, meters = np.ones((1, 1, 8, 4)), np.ones((1, 1, 64, 4)), [Meter(), Meter()]
    >>> def on_a_rank(comm):
    ...     parts = (shard(x, comm) for x in (q, kv, kv))
    ...     cross_attention(*parts, comm, meter=meters[comm.rank])
    >>> _ = run_ranks(2, on_a_rank)
    >>> meters[0].messages, meters[0].bytes
    (2, 320)
    """

    messages: int = 0
    bytes: int = 0
    computing: float = 0.0
    waiting: float = 0.0

    def totals(self) -> "Meter":
        """Return the totals as a plain meter."""
        return Meter(self.messages, self.bytes, self.computing, self.waiting)

    def begins(self, name: str) -> None:
        """Record the begin of a pass."""

    def sent(self, nbytes: int, dest: int, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Count a block that is about to be sent to `dest`; `what` returns it."""
        self.messages += 1
        self.bytes += nbytes

    @contextmanager
    def computes(self, what: Callable[[], Block]) -> Iterator[None]:
        """Time the context as computing with the block that `what` returns."""
        start = perf_counter()
        yield
        self.computed_from(start, perf_counter(), what)

    @contextmanager
    def waits(self, what: Callable[[], Block]) -> Iterator[None]:
        """Time the context as waiting for the block that `what` returns."""
        start = perf_counter()
        yield
        self.waited_from(start, perf_counter(), what)

    def computed_from(self, start: float, end: float, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Add a span of computing."""
        self.computing += end - start

    def waited_from(self, start: float, end: float, what: Callable[[], Block]) -> None:  # noqa: ARG002
        """Add a span of waiting."""
        self.waiting += end - start
