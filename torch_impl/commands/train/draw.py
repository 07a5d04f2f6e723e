"""The pictures: the curve, and the attention to every frame."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from lvxattn.common.layout import share
from lvxattn.draw.picture import save_picture
from lvxattn.draw.rotation import COLOURS, INK
from lvxattn.torch_impl.commands.train.model import Needle
from lvxattn.torch_impl.commands.train.training_report import Curve

_BLUE, _ORANGE, _GREY = COLOURS[0], COLOURS[1], COLOURS[7]
_DPI = 100
_WINDOW = 15
"""Steps over which the loss is averaged."""


def draw_curve(path: Path, curve: Curve, target: float, title: str) -> None:
    """Draw loss and accuracy against the step.

    Parameters
    ----------
    path : pathlib.Path
    curve : Curve
        With at least one row.
    target : float
        The share of right answers to train for.
    title : str
    """
    figure = _figure(8.0, 5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    steps, frames, loss, accuracy = (
        np.array(curve.column(name), dtype=float) for name in ("step", "frames", "loss", "accuracy")
    )
    above.plot(steps, loss, color=_BLUE, alpha=0.3, lw=0.8)
    above.plot(steps, _smooth(loss), color=_BLUE, lw=2, label=f"mean of {_WINDOW} steps")
    above.set_ylabel("loss (nats a question)")
    above.set_ylim(0, 1.05 * max(np.log(10), *loss[np.isfinite(loss)]))
    above.axhline(np.log(10), color=_GREY, ls=":", lw=1.2)
    above.text(steps[-1], np.log(10), "guessing ", ha="right", va="bottom", color=INK, size=9)
    above.set_title(title, loc="left", color=INK, size=12, pad=22)

    below.plot(steps, _smooth(accuracy), color=_BLUE, lw=2, label="images trained on")
    looks = [(s, x) for s, x in zip(steps, curve.column("held_out"), strict=True) if x is not None]
    if looks:
        below.plot(*zip(*looks, strict=True), "o-", color=_ORANGE, ms=4, lw=1.2, label="held-out")
    below.axhline(target, color=INK, ls=":", lw=1.2)
    below.text(steps[0], target, f" {target:.0%}", va="bottom", color=INK, size=9)
    below.set_ylim(0, 1.08)
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_ylabel("right answers")
    below.set_xlabel("step")
    below.set_xlim(0, len(curve) + 1)
    below.legend(loc="lower right", frameon=False)
    _mark_lengths((above, below), frames)
    save_picture(figure, path, dpi=_DPI, facecolor="white")


def draw_needles(path: Path, needles: Sequence[Needle], layer: int, ranks: int) -> None:
    """Draw questions, answers, and each frame's share of the attention.

    Parameters
    ----------
    path : pathlib.Path
    needles : sequence of Needle
    layer : int
        The layer of that attention.
    ranks : int
    """
    rows = (len(needles) + 1) // 2
    figure = _figure(10.0, 0.75 + 1.85 * rows)
    figure.suptitle(
        f"Which digit is at this marker?   Attention of layer {layer} over "
        f"{len(needles[0].weights):,} frames on {ranks} rank{'s' * (ranks > 1)}",
        x=0.01, ha="left", color=INK, size=12,
    )  # fmt: skip
    cells: list[SubFigure] = np.ravel(figure.subfigures(rows, 2, squeeze=False)).tolist()
    for cell, needle in zip(cells, needles, strict=False):
        _draw_needle(cell, needle, ranks)
    save_picture(figure, path, dpi=_DPI, facecolor="white")


def _draw_needle(cell: SubFigure, needle: Needle, ranks: int) -> None:
    left, right = cell.subplots(1, 2, width_ratios=(1, 3.6))
    # A frame as it is in the clip: the picture and, below it, its marker.
    gap, marker = np.full((1, 8), np.nan), needle.marker.reshape(2, 8)
    left.imshow(np.concatenate([needle.picture, gap, marker]), cmap="gray_r", vmin=-1, vmax=1)
    left.axis("off")
    for top, height in ((0, 8), (9, 2)):
        edge = Rectangle((-0.5, top - 0.5), 8, height, fill=False, ec=_GREY, lw=0.8, clip_on=False)
        left.add_patch(edge)
    left.set_title(f"frame {needle.frame:,}", size=9, color=INK)

    frames = len(needle.weights)
    for rank in range(ranks):
        held = share(frames, rank, ranks)
        colour = COLOURS[rank % len(COLOURS)]
        right.axvspan(held.start, held.stop, color=colour, alpha=0.12, lw=0)
        numbers = np.arange(held.start, held.stop)
        right.vlines(numbers + 0.5, 0, needle.weights[held], color=colour, lw=1.8)
        if ranks <= 8:
            middle = (held.start + held.stop) / 2
            right.text(middle, 1.02, f"rank {rank}", color=INK, size=8, ha="center", va="top")
    right.set_xlim(0, frames)
    right.set_ylim(0, 1.05)
    right.set_yticks([0, 0.5, 1])
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.tick_params(labelsize=8)
    right.set_xlabel("frame", size=8)
    verdict = "right" if needle.answer == needle.digit else f"WRONG, not {needle.digit}"
    weight = needle.weights[needle.frame]
    right.set_title(
        f"answer {needle.answer}, {verdict};  {weight:.0%} of the attention there",
        size=9, color=INK, loc="left",
    )  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _smooth(x: np.ndarray) -> np.ndarray:
    """Return the mean of each value and its neighbours, `_WINDOW` together or fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(x)])
    numbers = np.arange(len(x))
    starts = np.maximum(0, numbers - _WINDOW // 2)
    ends = np.minimum(len(x), numbers + _WINDOW // 2 + 1)
    smooth: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smooth


def _mark_lengths(axes: tuple[Axes, Axes], frames: np.ndarray) -> None:
    """Draw where the clips grow, and their lengths above the picture."""
    grown = [0, *(np.flatnonzero(np.diff(frames)) + 1), len(frames)]
    above = axes[0]
    for first, stop in pairwise(grown):
        if first:
            for each in axes:
                each.axvline(first + 0.5, color=_GREY, lw=0.6, alpha=0.6)
        if stop - first > len(frames) / 40:
            above.text(
                (first + stop + 1) / 2, 1.02, f"{frames[first]:,.0f}",
                transform=above.get_xaxis_transform(), ha="center", size=8, color=INK,
            )  # fmt: skip
    above.text(1.0, 1.09, "frames a clip", transform=above.transAxes, ha="right", size=8, color=INK)
