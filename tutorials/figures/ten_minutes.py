"""The figure of notebook 0: what stays and what travels on two rings, areas in scale."""

import matplotlib.pyplot as plt
from figures import BLUE, DARK_ORANGE, GREY, INK, ORANGE
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

# Corners of the ring, clockwise, where the ranks are.
CORNERS = ((-1, 1), (1, 1), (1, -1), (-1, -1))
SIDE = 0.72  # of the square that is a rank's keys and values


def two_rings(stored: float, queries: float, keys: float) -> None:
    """Draw four ranks twice: with queries and results on the way, and with keys and values.

    Parameters
    ----------
    stored : float
        Bytes of a rank's keys and values.
    queries, keys : float
        Bytes that a rank sends in one hop: queries and results, and keys and values.
    """
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 4.9))
    small, large = (SIDE * (nbytes / stored) ** 0.5 for nbytes in (queries, keys))
    _ranks(left, SIDE, BLUE)
    _travellers(left, small, ORANGE, f"{queries / 1e6:.1f} MB")
    _ranks(right, small, ORANGE)
    _travellers(right, large, BLUE, "")
    left.text(-1, 1, f"{stored / 1e9:.1f} GB", color="white", ha="center", va="center", size=12)
    right.text(0, 1, f"{keys / 1e9:.1f} GB", color="white", ha="center", va="center", size=12)
    left.set_title("LV-XAttn: queries and results travel", color=DARK_ORANGE, size=13, pad=14)
    right.set_title("Ring Attention: keys and values travel", color=BLUE, size=13, pad=14)
    plt.show()


def _ranks(axes: Axes, side: float, colour: str) -> None:
    """Draw what stays on the ranks, and their names."""
    axes.set(xlim=(-1.6, 1.6), ylim=(-1.75, 1.6), aspect="equal")
    axes.axis("off")
    for rank, (x, y) in enumerate(CORNERS):
        axes.add_patch(
            Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=GREY, lw=1.2)
        )
        _square(axes, x, y, side, colour)
        below = y - 0.62 if y < 0 else y + 0.54
        axes.text(x, below, f"rank {rank}", ha="center", color=INK, size=11)


def _travellers(axes: Axes, side: float, colour: str, label: str) -> None:
    """Draw what travels, half way between two ranks, on arrows that go round."""
    for n, start in enumerate(CORNERS):
        end = CORNERS[(n + 1) % 4]
        dx, dy = (end[0] - start[0]) / 2, (end[1] - start[1]) / 2
        x, y = start[0] + dx, start[1] + dy
        axes.annotate(
            "",
            (end[0] - 0.48 * dx, end[1] - 0.48 * dy),
            (start[0] + 0.48 * dx, start[1] + 0.48 * dy),
            arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.4},
            zorder=1,
        )
        _square(axes, x, y, side, colour)
        if label and n == 0:
            axes.text(x, y + 0.12, label, ha="center", color=DARK_ORANGE, size=12)


def _square(axes: Axes, x: float, y: float, side: float, colour: str) -> None:
    """Draw a square around a point."""
    axes.add_patch(
        Rectangle((x - side / 2, y - side / 2), side, side, color=colour, lw=0, zorder=2)
    )
