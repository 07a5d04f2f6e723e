"""What a trace needs of a run, and where it goes."""

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from lvxattn.cli.clocks import compare_clocks
from lvxattn.cli.ranks import Ranks
from lvxattn.cli.tensors import InputError
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Meter
from lvxattn.common.timeline import Timeline
from lvxattn.draw.rotation import PICTURES
from lvxattn.plan.trace import Clock, Trace
from lvxattn.plan.trace_file import write_trace


class Recorder:
    """Gives out meters: timelines if a trace is wanted, and then it knows all ranks' clocks, too.

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
        """Return a meter for one repetition.  Collective: every rank calls this before it.

        All of them are timelines, so that all cost the same; the trace is of the last one.
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


def check_picture(options: Namespace) -> None:
    """Refuse a picture that cannot be drawn in the end.

    Raises
    ------
    InputError
        There is nothing to draw with, or the file's name says nothing that is known.
    """
    if options.plot_trace is None:
        return
    if Path(options.plot_trace).suffix.lower() not in PICTURES:
        raise InputError(
            f"--plot-trace: expected a name that ends in {', '.join(PICTURES)}, "
            f"got {options.plot_trace}"
        )
    if find_spec("matplotlib") is None:
        raise InputError("--plot-trace: needs matplotlib, which is not installed")


def save_trace(options: Namespace, trace: Trace, layout: Layout, hosts: list[str]) -> None:
    """Write the file and the picture that are asked for.  Not collective: rank 0 calls this.

    Parameters
    ----------
    options : argparse.Namespace
    trace : Trace
    layout : Layout
    hosts : list of str
        Every rank's.
    """
    if options.trace:
        write_trace(trace, options.trace, hosts, {"schedule": layout.schedule})
    if options.plot_trace:
        from lvxattn.draw.trace import draw_trace  # matplotlib takes its time

        draw_trace(trace, layout.schedule).savefig(options.plot_trace, dpi=110)
