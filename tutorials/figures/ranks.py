"""Figures of notebook 4: blocks on ranks, a deadlock, time on a rank, patches that were found."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from figures import BLUE, COLOURS, INK, ORANGE, YELLOW
from matplotlib.patches import Patch, Rectangle

from lvxattn.plan.trace import Overlap, Trace


def blocks_by_hop(holds: Sequence[Sequence[int]]) -> None:
    """Draw whose block each rank holds after each hop."""
    _, axes = plt.subplots(figsize=(8, 3))
    for rank, owners in enumerate(holds):
        for hop, owner in enumerate(owners):
            axes.add_patch(Rectangle((hop - 0.45, rank - 0.4), 0.9, 0.8, color=COLOURS[owner]))
            style = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
            axes.text(hop, rank, f"block of {owner}", **style)
    P = len(holds)
    axes.set(xlim=(-0.5, P - 0.5), ylim=(P - 0.5, -0.5), xlabel="hops", xticks=range(P))
    _name_ranks(axes, P)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("Each block moves down one rank per hop", size=11, color=INK)
    plt.show()


def waiting_in_a_circle(call: str) -> None:
    """Draw four ranks, each waiting in a call for its right neighbour."""
    _, axes = plt.subplots(figsize=(8, 1.6))
    for rank in range(4):
        box = {"boxstyle": "round", "fc": COLOURS[rank], "ec": "none"}
        style = {"ha": "center", "va": "center", "color": "white", "weight": "bold", "bbox": box}
        axes.text(rank, 0, f"rank {rank}\nin {call}", **style)
        last = rank == 3
        bend = "arc3,rad=-0.18" if last else "arc3"
        start, end = ((3, -0.35), (0, -0.35)) if last else ((rank + 0.28, 0), (rank + 0.72, 0))
        arrow = {"arrowstyle": "-|>", "color": INK, "connectionstyle": bend, "lw": 1.5}
        axes.annotate("", end, start, arrowprops=arrow)
        height = -0.8 if last else 0.12
        axes.text((start[0] + end[0]) / 2, height, "waits for", ha="center", size=9)
    axes.set(xlim=(-0.5, 3.5), ylim=(-1.1, 0.6))
    axes.axis("off")
    plt.show()


def hidden_and_exposed(overlaps: Sequence[Overlap]) -> None:
    """Draw how much of each rank's communication was hidden, and how much exposed."""
    _, axes = plt.subplots(figsize=(8, 2.4))
    for rank, x in enumerate(overlaps):
        left = 0.0
        parts = (x.hidden, x.exposed, x.on_the_way - x.hidden - x.exposed)
        for part, colour in zip(parts, COLOURS, strict=False):
            axes.barh(rank, 1e3 * part, left=1e3 * left, color=colour, height=0.7)
            left += part
    for n, name in enumerate(("hidden", "exposed", "the rest")):
        axes.text(0.4 * n, 1.04, name, color=COLOURS[n], weight="bold", transform=axes.transAxes)
    axes.set(xlabel="milliseconds on the way", ylim=(len(overlaps) - 0.5, -0.5))
    _name_ranks(axes, len(overlaps))
    plt.show()


def on_one_axis(traces: Mapping[str, Trace], titles: Mapping[str, str]) -> None:
    """Draw when every rank computed and when it waited, schedule by schedule, on one time axis."""
    P = max(len(trace.computed) for trace in traces.values())
    size = (8, len(traces) * (0.27 * P + 0.5) + 0.6)
    figure, panels = plt.subplots(len(traces), 1, figsize=size, sharex=True)
    for axes, (name, trace) in zip(panels, traces.items(), strict=True):
        for spans_of, colour in ((trace.computed, BLUE), (trace.waited, ORANGE)):
            for rank, spans in enumerate(spans_of):
                bars = [(1e3 * span.start, 1e3 * (span.end - span.start)) for span in spans]
                axes.broken_barh(bars, (rank - 0.4, 0.8), facecolor=colour)
        axes.set_title(titles[name], loc="left", size=11, color=INK)
        axes.set_ylim(P - 0.4, -0.6)
        _name_ranks(axes, P)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[-1].set(xlabel="milliseconds", xlim=(0, None))
    names = {"computes": BLUE, "only waits": ORANGE}
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=10)
    plt.show()


def found_patches(queries: Sequence[Any], frames: Sequence[Any], found: Sequence[Any],
                  holders: Sequence[int], patch: int) -> None:  # fmt: skip
    """Draw each rank's noisy query, and a box at the frame, row and column that it found."""
    size = {"figsize": (8, 3.4), "height_ratios": (1, 1.6)}
    _, rows = plt.subplots(2, len(queries), **size)
    for rank, (frame, row, col) in enumerate(found):
        rows[0, rank].imshow(queries[rank])
        rows[0, rank].set_title(f"query of rank {rank}", size=10, color=INK)
        rows[1, rank].imshow(frames[rank])
        for colour, width in (("black", 4), (YELLOW, 2)):
            corner, side = (patch * col - 3, patch * row - 3), patch + 5
            box = Rectangle(corner, side, side, fill=False, ec=colour, lw=width)
            rows[1, rank].add_patch(box)
        rows[1, rank].set_title(f"found on rank {holders[rank]}", size=10, color=INK)
        rows[1, rank].set_xlabel(f"frame {frame}, row {row}, col {col}", size=9)
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    plt.show()


def _name_ranks(axes: Any, P: int) -> None:
    axes.set_yticks(range(P), [f"rank {rank}" for rank in range(P)])
