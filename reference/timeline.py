"""What a rank did when: a meter that writes down what it adds up.

    timelines = run_ranks(4, on_a_rank)     each rank hands a Timeline() as its meter
    Trace.of(timelines)                     puts them together (plan/trace.py)

Writing down is an append.  Words are made when the trace is written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from lvxattn.reference.meter import Block, Meter


class Span(NamedTuple):
    """A time in which a rank computed, or waited.

    Attributes
    ----------
    start, end : float
        Seconds of this rank's `perf_counter`.
    block : Block
        What was worked on, or awaited.
    """

    start: float
    end: float
    block: Block


class Post(NamedTuple):
    """A block that is about to be sent.

    Attributes
    ----------
    at : float
        Seconds of this rank's `perf_counter`.
    dest, nbytes : int
    block : Block
    """

    at: float
    dest: int
    nbytes: int
    block: Block


@dataclass
class Timeline(Meter):
    """A meter that also keeps every single thing that it adds up.

    Attributes
    ----------
    computed, waited : list of Span
        Their lengths add up to `computing` and `waiting`.
    posted : list of Post
        As many as `messages`.
    passes : list of (str, float)
        The name of every pass, and when it began.
    """

    computed: list[Span] = field(default_factory=list)
    waited: list[Span] = field(default_factory=list)
    posted: list[Post] = field(default_factory=list)
    passes: list[tuple[str, float]] = field(default_factory=list)

    def begins(self, name: str) -> None:
        """Begin a pass."""
        self.passes.append((name, perf_counter()))

    def sent(self, nbytes: int, dest: int, what: Callable[[], Block]) -> None:
        """Count one block, which is about to be sent to `dest`, and keep when that was."""
        super().sent(nbytes, dest, what)
        self.posted.append(Post(perf_counter(), dest, nbytes, what()))

    def computed_from(self, start: float, end: float, what: Callable[[], Block]) -> None:
        """Add a time of computing, and keep when that was."""
        super().computed_from(start, end, what)
        self.computed.append(Span(start, end, what()))

    def waited_from(self, start: float, end: float, what: Callable[[], Block]) -> None:
        """Add a time of waiting, and keep when that was."""
        super().waited_from(start, end, what)
        self.waited.append(Span(start, end, what()))
