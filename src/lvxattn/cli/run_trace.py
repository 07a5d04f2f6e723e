"""Traces of a run: timelines of all ranks, and the offsets of their clocks from rank 0's.

    rank 0   start --ask-->          <--reading-- end        offset = reading - (start + end) / 2
    rank r                 reading                           wrong by at most (end - start) / 2

The shortest of many round trips is the most accurate: the reading lies within it.  Clocks drift, so
offsets between two comparisons are interpolated (`plan.trace.Clock`).
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from lvxattn.cli.run_ranks import Ranks
from lvxattn.cli.tensors import InputError
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Meter
from lvxattn.common.timeline import Timeline
from lvxattn.draw.picture import cannot_draw, save_picture
from lvxattn.plan.choose import named
from lvxattn.plan.trace import Clock, Trace
from lvxattn.plan.trace_file import write_trace

# Round trips with one rank: at least, at most, and for how many seconds beyond the least.
FEWEST, MOST, SECONDS = 20, 200, 0.1
_ASK, _ENOUGH = 1.0, 0.0


class Recorder:
    """The meters of a run: timelines if a trace is wanted, and then all ranks' clocks, too.

    Parameters
    ----------
    options : argparse.Namespace
    ranks : Ranks
    """

    def __init__(self, options: Namespace, ranks: Ranks) -> None:
        self.ranks = ranks
        self.wanted = bool(options.trace or options.plot_trace)
        self.last = Timeline()
        self.clocks: list[Clock] = []

    def meter(self, *, last: bool) -> Meter:
        """Return the meter of one repetition.  Collective: every rank calls this before it.

        All are timelines, so that all repetitions cost the same; the trace is of the last one.
        """
        if not self.wanted:
            return Meter()
        if last:
            self.clocks = compare_clocks(self.ranks)
        self.last = Timeline()
        return self.last

    def trace(self) -> Trace | None:
        """Return the trace of the last repetition.  Collective: every rank calls this after it."""
        if not self.wanted:
            return None
        later = compare_clocks(self.ranks)
        clocks = [clock.until(now) for clock, now in zip(self.clocks, later, strict=True)]
        return Trace.of(self.ranks.allgather(self.last), clocks)


def compare_clocks(
    ranks: Ranks, read: Callable[[], float] | None = None, others: Sequence[int] | None = None
) -> list[Clock]:
    """Compare ranks' clocks with rank 0's.  Collective: every rank calls this.

    Parameters
    ----------
    ranks : Ranks
    read : callable, optional
        Returns the time (default: `perf_counter`).
    others : sequence of int, optional
        The ranks to compare with rank 0 (default: all).

    Returns
    -------
    list of Clock
        Of rank 0 and the others, in their order; the same on all ranks.
    """
    read = read or perf_counter
    others = range(1, ranks.size) if others is None else others
    clocks = [Clock(at=read())]
    if ranks.rank == 0:
        clocks += [_compare_with(ranks, rank, read) for rank in others]
        for rank in others:
            ranks.send(_ENOUGH, rank)
    elif ranks.rank in others:
        # Until all are done: a rank that went on to a collective would spin, and take the core of a
        # rank that answers.
        while ranks.receive(0) == _ASK:
            ranks.send(read(), 0)
    return ranks.allgather(clocks)[0]


def _compare_with(ranks: Ranks, rank: int, read: Callable[[], float]) -> Clock:
    """Return another rank's clock, from the shortest of many round trips."""
    found: list[Clock] = []
    began = read()
    while len(found) < FEWEST or (len(found) < MOST and read() - began < SECONDS):
        start = read()
        ranks.send(_ASK, rank)
        reading = ranks.receive(rank)
        end = read()
        found.append(Clock(reading - (start + end) / 2, (end - start) / 2, reading))
    return min(found, key=lambda clock: clock.accuracy)


def check_picture(options: Namespace) -> None:
    """Raise InputError if ``--plot-trace`` cannot be drawn."""
    if options.plot_trace is not None and (problem := cannot_draw(Path(options.plot_trace))):
        raise InputError(f"--plot-trace: {problem}")


def save_trace(options: Namespace, trace: Trace, layout: Layout, hosts: list[str]) -> None:
    """Write the trace and its picture, if wanted.  Not collective: rank 0 calls this.

    Parameters
    ----------
    options : argparse.Namespace
    trace : Trace
    layout : Layout
    hosts : list of str
        Every rank's.
    """
    schedule = named(layout.schedule, layout.grid)
    if options.trace:
        write_trace(trace, options.trace, hosts, {"schedule": schedule})
    if options.plot_trace:
        from lvxattn.draw.trace import draw_trace  # imports matplotlib

        save_picture(draw_trace(trace, schedule), options.plot_trace, dpi=110)
