"""Draw the rotation of LV-XAttn from the messages of a real forward.

``python -m lvxattn.draw.rotation FILE`` writes the README's picture.
"""

import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from lvxattn.common.layout import shard
from lvxattn.common.wire import BLOCKS, RESULTS
from lvxattn.draw.picture import save_picture
from lvxattn.reference.cross_attention import cross_attention
from lvxattn.reference.virtual_ranks import Message, VirtualComm, run_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

# One colour a rank, told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK = "#222222"


def rotation(P: int = 4) -> "Figure":
    """Run LV-XAttn's forward on P virtual ranks and draw whose queries each rank has at each hop.

    Parameters
    ----------
    P : int
        2 to 8.

    Returns
    -------
    matplotlib.figure.Figure
    """
    if not 2 <= P <= len(COLOURS):
        raise ValueError(f"P: expected 2 to {len(COLOURS)} ranks, got {P}")
    log: list[Message] = []
    run_ranks(P, _small_forward, log=log)
    visits, trips = follow(log, BLOCKS), follow(log, RESULTS, first_hop=1)

    figure = blank(10, 1.2 * P + 1.5)
    axes = figure.add_subplot()
    axes.set(xlim=(-1.62, P + 0.62), ylim=(P - 0.35, -0.98))
    axes.axis("off")
    for rank in range(P):
        _stays(axes, rank, P)
        _works(axes, 0, rank, rank, "first part")
        _works(axes, P, rank, rank, "the rest")
    for (hop, rank), owner in visits.items():
        _works(axes, hop, rank, owner, "")
    for (hop, rank), owner in visits.items():
        _moves(axes, hop - 1, (rank - 1) % P, rank, P, COLOURS[owner], queries=True)
    for (hop, rank), owner in trips.items():
        _moves(axes, hop - 1, (rank - 1) % P, rank, P, COLOURS[owner], queries=False)
    titles = ["home", *(f"hop {hop}" for hop in range(1, P)), "home again"]
    for column, title in enumerate(titles):
        axes.text(column, -0.72, title, ha="center", size=13, color=INK, weight="bold")
    axes.text(-1.2, -0.72, "stays", ha="center", size=13, color=INK, weight="bold")
    axes.plot([], [], color=INK, lw=2.2, label="queries, sent on before they are worked on")
    axes.plot([], [], color=INK, lw=1.6, ls=(0, (2, 1.6)), label="what has been computed for them")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=11)
    return figure


def blank(width: float, height: float, dpi: int = 100) -> "Figure":
    """Return a white figure without axes, unknown to pyplot; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout="constrained")


def sheet(height: float = 3.0, columns: int = 1, width: float = 8.0) -> "tuple[Figure, Any]":
    """Return an empty figure in the style of all pictures.

    Parameters
    ----------
    height, width : float
        In units of 100 pixels.
    columns : int
        Number of axes side by side.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Unknown to pyplot: a notebook shows it where it is a cell's last line.
    axes : matplotlib.axes.Axes
        A list of them if there is more than one column.
    """
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    figure = blank(width, height)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, labelsize=10)
        axes.xaxis.label.set(color=INK, size=11)
        axes.yaxis.label.set(color=INK, size=11)
        axes.title.set(color=INK, size=12)
    return figure, panels if columns > 1 else panels[0]


def follow(log: list[Message], tag: int, first_hop: int = 0) -> dict[tuple[int, int], int]:
    """Follow every block of one kind through a log of messages.

    A rank's first message has the block that it worked on at `first_hop`; every later one passes on
    the block that last came from the left.

    Returns
    -------
    dict
        The owner of the block that arrived, by hop and rank.
    """
    destinations: dict[int, list[int]] = defaultdict(list)
    for message in log:
        if message.tag == tag:
            destinations[message.source].append(message.dest)
    holds = {rank: rank for rank in destinations}
    for _ in range(first_hop):
        holds = {dests[0]: holds[rank] for rank, dests in destinations.items()}
    arrivals = {}
    for n in range(max(map(len, destinations.values()), default=0)):
        holds = {dests[n]: holds[rank] for rank, dests in destinations.items()}
        arrivals.update({(first_hop + n + 1, rank): owner for rank, owner in holds.items()})
    return arrivals


def _small_forward(comm: VirtualComm) -> None:
    rng = np.random.default_rng(0)
    q, kv = rng.standard_normal((1, 1, 8, 4)), rng.standard_normal((1, 1, 64, 4))
    cross_attention(shard(q, comm), shard(kv, comm), shard(kv, comm), comm)


def _stays(axes: "Axes", rank: int, P: int) -> None:
    """Draw a rank's keys and values, and its row."""
    axes.add_patch(_box(-1.58, P + 1.93, rank, fc=COLOURS[rank], alpha=0.13))
    axes.add_patch(_box(-1.58, 0.76, rank, fc=COLOURS[rank]))
    keys = f"rank {rank}\n$k_{rank}\\ \\ v_{rank}$"
    axes.text(-1.2, rank, keys, ha="center", va="center", size=12, color="white", weight="bold")


def _works(axes: "Axes", column: int, rank: int, owner: int, note: str) -> None:
    """Draw a block of queries at the rank that computes with it."""
    from matplotlib.patches import Ellipse

    middle = rank - (0.06 if note else 0)
    axes.add_patch(Ellipse((column, middle), 0.3, 0.4, fc=COLOURS[owner], lw=0))
    text: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text(column, middle, f"$q_{owner}$", size=14, color="white", **text)
    axes.text(column, rank + 0.22, note, size=9, color=INK, **text)


def _moves(
    axes: "Axes", column: int, source: int, dest: int, P: int, colour: str, *, queries: bool
) -> None:
    """Draw one hop; that from the last rank to the first leaves below and enters above."""
    offset = -0.07 if queries else 0.09
    line: dict[str, Any] = {"color": colour, "lw": 2.2 if queries else 1.6}
    line["linestyle"] = "-" if queries else (0, (2, 1.6))
    arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13, **line}
    start, end = (column + 0.2, source + offset), (column + 0.8, dest + offset)
    if dest > source:
        axes.annotate("", end, start, arrowprops=arrow)
    else:
        below, above = (column + 0.5 - offset, P - 0.45), (column + 0.5 - offset, -0.5)
        axes.plot(*zip(start, below, strict=True), **line)
        axes.annotate("", end, above, arrowprops=arrow)


def _box(left: float, width: float, row: int, **style: Any) -> "FancyBboxPatch":
    from matplotlib.patches import FancyBboxPatch

    corners = "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch((left, row - 0.32), width, 0.64, boxstyle=corners, lw=0, **style)


if __name__ == "__main__":
    save_picture(rotation(), sys.argv[1], dpi=110)
