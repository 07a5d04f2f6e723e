"""Merge the timelines of all ranks into a trace on one clock: spans, messages and their overlap.

    rank 0   computing  [== queries of 0 ==]  [== queries of 1 ==]
             sending    [- queries of 0 -]
    rank 1   computing  [= queries of 1 =]    [== queries of 0 ==]
             waiting                      [..]

A block is *on the way* from just before it is sent until its receiver has waited for it.  It may
have arrived earlier: a rank that computes does not look.  Each rank's seconds are split into

    on the way   a block was on the way to or from the rank
    hidden       of that, the rank computed meanwhile: the overlap
    exposed      of that, the rank waited

The rest of the first went to other work, such as merging and copying blocks.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lvxattn.common.meter import Block
from lvxattn.common.timeline import Post, Span, Timeline

Interval = tuple[float, float]


class Clock(NamedTuple):
    """A rank's clock relative to that of rank 0, from one or two comparisons.

    Attributes
    ----------
    offset : float
        Seconds by which it is ahead.
    accuracy : float
        Largest error of the offset in seconds.
    at : float
        Time of the comparison, on this clock.
    drift : float
        Seconds gained per second.
    """

    offset: float = 0.0
    accuracy: float = 0.0
    at: float = 0.0
    drift: float = 0.0

    def until(self, later: "Clock") -> "Clock":
        """Return a clock with the drift between two comparisons."""
        elapsed = later.at - self.at
        drift = (later.offset - self.offset) / elapsed if elapsed > 0 else 0.0
        return Clock(self.offset, max(self.accuracy, later.accuracy), self.at, drift)

    def aligned(self, time: float) -> float:
        """Convert a time on this clock to rank 0's clock."""
        return time - self.offset - self.drift * (time - self.at)


@dataclass(frozen=True)
class Trip:
    """A message: one block sent from one rank to another; times are on the trace's clock.

    Attributes
    ----------
    source, dest, nbytes : int
    block : Block
    turn : int
        Number of earlier trips of the same block between the same ranks, in other passes.
    posted : float
        Time just before it was sent.
    gone : float
        Time at which the sender's wait for its completion ended; `taken.end` if there was none.
    taken : Span or None
        The receiver's wait that ended with it; None if there was none.
    """

    source: int
    dest: int
    nbytes: int
    block: Block
    turn: int
    posted: float
    gone: float
    taken: Span | None


class Overlap(NamedTuple):
    """Seconds of one rank, as defined in the module's docstring."""

    on_the_way: float
    hidden: float
    exposed: float


@dataclass(frozen=True)
class Trace:
    """The timelines of all ranks; seconds on rank 0's clock since the first event.

    Attributes
    ----------
    computed, waited : list of list of Span
        By rank.
    trips : list of Trip
        Sorted by `posted`.
    passes : list of list of (str, float)
        By rank: the name of every pass, and when it began.
    accuracy : list of float
        Of every rank's clock; times of two ranks may differ by the sum of theirs.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.common.timeline import Timeline
    >>> from lvxattn.reference import cross_attention, run_ranks, shard
    >>> def on_a_rank(comm):
    ...     q, kv, timeline = np.ones((1, 1, 8, 4)), np.ones((1, 1, 64, 4)), Timeline()
    ...     cross_attention(*(shard(x, comm) for x in (q, kv, kv)), comm, meter=timeline)
    ...     return timeline
    >>> trace = Trace.of(run_ranks(2, on_a_rank))
    >>> sorted(trip.block.name for trip in trace.trips)[:2]
    ['the queries of rank 0', 'the queries of rank 1']
    """

    computed: list[list[Span]]
    waited: list[list[Span]]
    trips: list[Trip]
    passes: list[list[tuple[str, float]]]
    accuracy: list[float]

    @staticmethod
    def of(timelines: Sequence[Timeline], clocks: Sequence[Clock] | None = None) -> "Trace":
        """Merge timelines.  Not collective.

        Parameters
        ----------
        timelines : sequence of Timeline
            Of all ranks, in rank order.
        clocks : sequence of Clock, optional
            Default: all ranks share one clock.
        """
        clocks = clocks or [Clock()] * len(timelines)
        pairs = list(zip(timelines, clocks, strict=True))
        zero = min((clock.aligned(t) for x, clock in pairs for t in _times(x)), default=0.0)

        def on_rank_0(clock: Clock, spans: list[Span]) -> list[Span]:
            return [
                Span(clock.aligned(start) - zero, clock.aligned(end) - zero, block)
                for start, end, block in spans
            ]

        waited = [on_rank_0(clock, x.waited) for x, clock in pairs]
        posted = [
            (source, post._replace(at=clock.aligned(post.at) - zero))
            for source, (x, clock) in enumerate(pairs)
            for post in x.posted
        ]
        trips = _trips(posted, waited)
        # A rank also waits for its first block of a kind to be gone, before it has sent one.
        left = {(trip.source, trip.block[:3]) for trip in trips}
        return Trace(
            [on_rank_0(clock, x.computed) for x, clock in pairs],
            [
                [w for w in spans if w.block.dest is None or (rank, w.block[:3]) in left]
                for rank, spans in enumerate(waited)
            ],
            trips,
            [[(name, clock.aligned(at) - zero) for name, at in x.passes] for x, clock in pairs],
            [clock.accuracy for clock in clocks],
        )

    def sent_by(self, rank: int) -> list[tuple[Trip, int]]:
        """Return the messages that a rank sent, each with its lane (`lanes`)."""
        mine = [trip for trip in self.trips if trip.source == rank]
        return list(zip(mine, lanes([(trip.posted, trip.gone) for trip in mine]), strict=True))

    def overlap(self) -> list[Overlap]:
        """Return the hidden and exposed communication of every rank."""
        found = []
        for rank in range(len(self.computed)):
            on_the_way = _union(
                (trip.posted, trip.taken.end)
                for trip in self.trips
                if trip.taken and rank in (trip.source, trip.dest)
            )
            computed, waited = (
                _union((span.start, span.end) for span in spans)
                for spans in (self.computed[rank], self.waited[rank])
            )
            hidden, exposed = (_length(_common(on_the_way, x)) for x in (computed, waited))
            found.append(Overlap(_length(on_the_way), hidden, exposed))
        return found


def lanes(intervals: Sequence[Interval]) -> list[int]:
    """Assign each of sorted intervals to a lane, in which any two are disjoint or nested."""
    open_ends: list[list[float]] = []
    found = []
    for start, end in intervals:
        for ends in open_ends:
            while ends and ends[-1] <= start:
                ends.pop()
        free = (n for n, ends in enumerate(open_ends) if not ends or end <= ends[-1])
        lane = next(free, len(open_ends))
        if lane == len(open_ends):
            open_ends.append([])
        open_ends[lane].append(end)
        found.append(lane)
    return found


def _times(x: Timeline) -> list[float]:
    """Return the time of the first event of each kind."""
    starts = [span.start for span in (*x.computed[:1], *x.waited[:1])]
    return [*starts, *(post.at for post in x.posted[:1]), *(at for _, at in x.passes[:1])]


def _trips(posted: list[tuple[int, Post]], waited: list[list[Span]]) -> list[Trip]:
    """Match every block sent with the wait that ended with it.

    The n-th time that a block is sent from one rank to another belongs to the n-th time that it is
    awaited.  A reduction counts messages both ways and waits for them once.
    """
    awaited: dict[tuple[int, int | None, Block], list[Span]] = defaultdict(list)
    for rank, spans in enumerate(waited):
        for wait in spans:
            awaited[rank, wait.block.source, _bare(wait.block)].append(wait)
    often: dict[tuple[int, int, Block], list[Post]] = defaultdict(list)
    for source, post in posted:
        often[source, post.dest, _bare(post.block)].append(post)

    trips = []
    for (source, dest, block), posts in often.items():
        arrivals = awaited[dest, source, block] or awaited[dest, None, block]
        departures = awaited[source, None, block]  # waits for it to be gone, or for a collective
        for n, post in enumerate(posts):
            taken, left = (_share(spans, n, len(posts)) for spans in (arrivals, departures))
            ends = [span.end for span in (left, taken) if span]
            gone = max([post.at, *ends[:1]])
            trips.append(Trip(source, dest, post.nbytes, block, n, post.at, gone, taken))
    return sorted(trips, key=lambda trip: (trip.posted, -trip.gone))


def _bare(block: Block) -> Block:
    return block._replace(source=None, dest=None)


def _share(spans: list[Span], n: int, count: int) -> Span | None:
    return spans[n * len(spans) // count] if spans else None


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as sorted, disjoint intervals."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif start < end:
            found.append((start, end))
    return found


def _common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Return the intersection of two unions."""
    found, ends = [], [end for _, end in b]
    for start, end in a:
        for i in range(bisect_left(ends, start), len(b)):
            if b[i][0] >= end:
                break
            found.append((max(start, b[i][0]), min(end, b[i][1])))
    return found


def _length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)
