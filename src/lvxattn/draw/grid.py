"""Draw a grid of ranks from the messages of a real forward.

``python -m lvxattn.draw.grid FILE`` writes the README's picture.
"""

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from lvxattn.common.layout import Layout, shard
from lvxattn.common.wire import BLOCKS, RESULTS
from lvxattn.draw.picture import save_picture
from lvxattn.draw.rotation import COLOURS, INK, blank
from lvxattn.reference import Layout as AgreedLayout
from lvxattn.reference.cross_attention import cross_attention
from lvxattn.reference.virtual_ranks import Message, VirtualComm, run_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 0.62, 0.5  # of a rank, in a cell of 1 by 1
_QUERIES, _KEYS = COLOURS[0], COLOURS[5]


def grid(a: int = 2, b: int = 3) -> "Figure":
    """Run the grid's forward on a b virtual ranks, and draw what each sends to whom.

    Parameters
    ----------
    a, b : int
        The numbers of ranks that queries, and that keys, move among; at least 2 and at most 4.

    Returns
    -------
    matplotlib.figure.Figure
    """
    if not (2 <= a <= 4 and 2 <= b <= 4):
        raise ValueError(f"a, b: expected 2 to 4, got {a} and {b}")
    log: list[Message] = []
    layout = run_ranks(a * b, _small_forward, (a, b), log=log)[0]
    at = {
        rank: (layout.ring("keys", rank).index(rank), layout.ring("queries", rank).index(rank))
        for rank in layout.order
    }
    figure = blank(1.2 + 2.1 * b, 1.0 + 1.6 * a)
    axes = figure.add_subplot()
    axes.set(xlim=(-0.62, b - 0.38), ylim=(a - 0.4, -0.5))
    axes.axis("off")
    for rank, (column, row) in at.items():
        _rank(axes, rank, column, row)
    for (source, dest, tag), n in Counter((m.source, m.dest, m.tag) for m in log).items():
        (column, row), (to_column, to_row) = at[source], at[dest]
        if column == to_column:
            _down(axes, column, row, to_row, a, n, results=tag == RESULTS)
        else:
            assert tag == BLOCKS
            _across(axes, row, column, to_column, b, n)
    for label, colour, style in (
        ("q, then what has been computed for it, round a column", _QUERIES, "-"),
        ("k, v, round a row", _KEYS, "-"),
    ):
        axes.plot([], [], color=colour, lw=2.2, ls=style, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False, fontsize=11)
    return figure


def _small_forward(comm: VirtualComm, shape: tuple[int, int]) -> Layout:
    rng = np.random.default_rng(0)
    q, kv = rng.standard_normal((1, 1, 24, 4)), rng.standard_normal((1, 1, 48, 4))
    parts = shard(q, comm), shard(kv, comm), shard(kv, comm)
    layout = AgreedLayout.agree(*parts, comm, schedule="grid", grid=shape)
    cross_attention(*parts, comm, layout=layout)
    return layout


def _rank(axes: "Axes", rank: int, column: int, row: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = column - _WIDTH / 2, row - _HEIGHT / 2
    shape = "round,pad=0,rounding_size=0.05"
    axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, boxstyle=shape, lw=0, fc="#EDEDED"))
    say: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text(column, row - 0.12, f"rank {rank}", size=12, color=INK, weight="bold", **say)
    axes.text(column - 0.15, row + 0.1, f"$q_{rank}$", size=15, color=_QUERIES, **say)
    axes.text(column + 0.1, row + 0.1, f"$k_{rank}\\ v_{rank}$", size=15, color=_KEYS, **say)


def _down(
    axes: "Axes", column: int, row: int, to_row: int, rows: int, n: int, *, results: bool
) -> None:
    """Draw the messages of one kind from a rank to the next one in its column."""
    x = column + (0.12 if results else -0.12)
    _arrow(axes, (x, row + _HEIGHT / 2), (x, to_row - _HEIGHT / 2), (x, rows - 0.62), (x, -0.42),
           _QUERIES, results, wraps=to_row < row)  # fmt: skip
    if to_row > row:
        what = "results" if results else "q"
        axes.text(x + (0.03 if results else -0.03), (row + to_row) / 2, f"{what} x{n}", size=9,
                  color=_QUERIES, ha="left" if results else "right", va="center")  # fmt: skip


def _across(axes: "Axes", row: int, column: int, to_column: int, columns: int, n: int) -> None:
    """Draw the messages from a rank to the next one in its row."""
    _arrow(axes, (column + _WIDTH / 2, row), (to_column - _WIDTH / 2, row), (columns - 0.55, row),
           (-0.45, row), _KEYS, False, wraps=to_column < column)  # fmt: skip
    if to_column > column:
        axes.text((column + to_column) / 2, row - 0.05, f"k, v x{n}", size=9, color=_KEYS,
                  ha="center", va="bottom")  # fmt: skip


def _arrow(
    axes: "Axes", start: tuple[float, float], end: tuple[float, float],
    leaves: tuple[float, float], enters: tuple[float, float], colour: str, dashed: bool, *,
    wraps: bool,
) -> None:  # fmt: skip
    """Draw an arrow; one that wraps leaves at one edge and enters at the other."""
    line: dict[str, Any] = {
        "color": colour,
        "lw": 2.0,
        "linestyle": (0, (2, 1.6)) if dashed else "-",
    }
    arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13, **line}
    if wraps:
        axes.plot(*zip(start, leaves, strict=True), **line)
        start = enters
    axes.annotate("", end, start, arrowprops=arrow)


if __name__ == "__main__":
    save_picture(grid(), sys.argv[1], dpi=110)
