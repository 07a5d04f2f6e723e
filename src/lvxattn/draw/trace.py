"""Draw a trace: the spans of every rank, and an arrow for every block."""

from typing import TYPE_CHECKING, Any

from lvxattn.common.wire import NAMES
from lvxattn.draw.rotation import COLOURS, INK, blank
from lvxattn.plan.trace import Trace, Trip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, green and orange, distinguishable with colour blindness.
_COMPUTING, _SENDING, _WAITING = COLOURS[0], COLOURS[2], COLOURS[1]
# Top and height of the three in a rank's row of height 1, downwards.
_TRACKS = {_COMPUTING: (0.08, 0.34), _SENDING: (0.45, 0.2), _WAITING: (0.68, 0.2)}
_FOLLOWING = {follows for _, follows in NAMES.values()}
_DASHES = (0, (4, 2))


def draw_trace(trace: Trace, title: str) -> "Figure":
    """Draw a trace.  Not collective.

    Parameters
    ----------
    trace : Trace
    title : str
        The schedule.

    Returns
    -------
    matplotlib.figure.Figure
    """
    P = len(trace.computed)
    height = 1.6 + P * min(0.85, 20 / P)
    figure = blank(10, height)
    axes = figure.add_subplot()
    for rank in range(P):
        _row(axes, trace, rank)
    for trip in trace.trips:
        _arrow(axes, trip)
    for name, at in trace.passes[0] if trace.passes else []:
        axes.axvline(1e3 * at, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.text(1e3 * at, -0.06, f" {name}", size=10, color=INK, va="bottom")
    end = max(
        (span.end for x in (trace.computed, trace.waited) for s in x for span in s), default=0
    )
    axes.set(xlim=(0, 1e3 * end or 1), ylim=(P, -0.3), xlabel="milliseconds")
    axes.set_title(f"{title} on {P} ranks", size=12, color=INK)
    axes.set_yticks([rank + 0.5 for rank in range(P)], [f"rank {rank}" for rank in range(P)])
    axes.tick_params(axis="y", length=0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    _legend(figure)
    return figure


def _row(axes: "Axes", trace: Trace, rank: int) -> None:
    if rank % 2 == 0:
        axes.axhspan(rank, rank + 1, color="#F3F3F3", lw=0, zorder=-1)
    sent = trace.sent_by(rank)
    count = 1 + max((lane for _, lane in sent), default=0)
    for lane in range(count):
        spans = [(trip.posted, trip.gone) for trip, n in sent if n == lane]
        _bars(axes, rank, _SENDING, spans, lane=lane, count=count)
    for colour, mine in ((_COMPUTING, trace.computed[rank]), (_WAITING, trace.waited[rank])):
        _bars(axes, rank, colour, [(span.start, span.end) for span in mine])
    whole = max((span.end for spans in trace.computed for span in spans), default=0.0)
    top, height = _TRACKS[_COMPUTING]
    for start, end, block in trace.computed[rank]:
        if block.whose is not None and end - start > 0.02 * whole:
            middle = 500 * (start + end), rank + top + height / 2
            text: dict[str, Any] = {"ha": "center", "va": "center", "size": 10, "color": "white"}
            axes.text(*middle, str(block.whose), weight="bold", zorder=5, **text)


def _bars(
    axes: "Axes",
    rank: int,
    colour: str,
    intervals: list[tuple[float, float]],
    lane: int = 0,
    count: int = 1,
) -> None:
    top, height = _TRACKS[colour]
    bars = [(1e3 * start, 1e3 * (end - start)) for start, end in intervals]
    where = rank + top + height * lane / count, height / count
    axes.broken_barh(bars, where, facecolor=colour, edgecolor="white", lw=0.5)


def _arrow(axes: "Axes", trip: Trip) -> None:
    """Draw an arrow from the sender's track of sending to the receiver's of waiting."""
    if trip.taken is None or not trip.nbytes:
        return
    start = 1e3 * trip.posted, trip.source + sum(_TRACKS[_SENDING])
    end = 1e3 * trip.taken.end, trip.dest + _TRACKS[_WAITING][0] + _TRACKS[_WAITING][1] / 2
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9, "lw": 1}
    dashes = _DASHES if trip.block.kind in _FOLLOWING else "-"
    axes.annotate("", end, start, arrowprops={**style, "color": INK, "ls": dashes})


def _legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=_COMPUTING, label="computing with rank n's block"),
        Patch(color=_SENDING, label="sending, until seen to be gone"),
        Patch(color=_WAITING, label="waiting"),
        Line2D([], [], color=INK, lw=1, label="a block's way"),
        Line2D([], [], color=INK, lw=1, ls=_DASHES, label="what follows it"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
