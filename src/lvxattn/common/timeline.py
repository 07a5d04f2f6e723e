"""Record what a rank did when: a meter that keeps every span and message.

    timelines = run_ranks(4, on_a_rank)     each rank passes a Timeline() as its meter
    Trace.of(timelines)                     merges them (plan/trace.py)

Recording is an append; text is formatted when the trace is written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from lvxattn.common.meter import Block, Meter


class Span(NamedTuple):
    """A span of time in which a rank computed or waited.

    Attributes
    ----------
    start, end : float
        Seconds of this rank's `perf_counter`.
    block : Block
        The block computed with, or awaited.
    """

    start: float
    end: float
    block: Block


class Post(NamedTuple):
    """A block that was about to be sent.

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
    """A meter that also keeps each of the spans and messages that it adds up.

    Attributes
    ----------
    computed, waited : list of Span
        Their lengths add up to `computing` and `waiting`.
    posted : list of Post
        As many as `messages`.
    passes : list of (str, float)
        The name of every pass, and when it began.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import cross_attention, run_ranks
    >>> q, kv, timeline = np.ones((1, 1, 8, 4)), np.ones((1, 1, 64, 4)), Timeline()
    >>> _ = run_ranks(1, lambda comm: cross_attention(q, kv, kv, comm, meter=timeline))
    >>> [str(span.block) for span in timeline.computed]
    ['the queries of rank 0']
    """

    computed: list[Span] = field(default_factory=list)
    waited: list[Span] = field(default_factory=list)
    posted: list[Post] = field(default_factory=list)
    passes: list[tuple[str, float]] = field(default_factory=list)

    def begins(self, name: str) -> None:
        """Record the begin of a pass."""
        self.passes.append((name, perf_counter()))

    def sent(self, nbytes: int, dest: int, what: Callable[[], Block]) -> None:
        """Count a block that is about to be sent to `dest`, and record it."""
        super().sent(nbytes, dest, what)
        self.posted.append(Post(perf_counter(), dest, nbytes, what()))

    def computed_from(self, start: float, end: float, what: Callable[[], Block]) -> None:
        """Add and record a span of computing."""
        super().computed_from(start, end, what)
        self.computed.append(Span(start, end, what()))

    def waited_from(self, start: float, end: float, what: Callable[[], Block]) -> None:
        """Add and record a span of waiting."""
        super().waited_from(start, end, what)
        self.waited.append(Span(start, end, what()))
