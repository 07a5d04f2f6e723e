"""The picture: noisy patches, the frames in which they were found, and the ranks that hold them.

Each example shows the patch as the asking rank sees it and, joined to it, the frame in which the
attention found it. The film below is the whole video, coloured by the rank that holds it; the
lanes above it show where each rank's queries were found.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import NDArray

from lvxattn.draw.picture import save_picture
from lvxattn.mpi_impl.commands.demo.answers import AMBIGUOUS, COLS, FOUND, Answers, film_frames
from lvxattn.mpi_impl.commands.demo.patches import PATCH
from lvxattn.mpi_impl.commands.demo.sources import Source

Pictures = Mapping[int, NDArray[np.uint8]]

_NAMED = 8
"""Maximum number of ranks for lanes to be labelled."""

_PAPER, _INK, _DIM = "#14171c", "#f2f2ee", "#9aa0a8"
_COLOURS = ("#56b4e9", "#e69f00", "#1fbf92", "#cc79a7", "#f0e442", "#d55e00", "#3d8fd1", "#ffffff")
"""Okabe and Ito's colours, distinct for colour-blind readers, a little lightened."""

_WIDTH, _HEIGHT = 12.0, 10.2  # inches, like all lengths below
_LEFT = 1.35
"""Left edge of the lanes and the film."""
_DPI = 150


def draw(
    path: Path,
    answers: Answers,
    verdicts: Sequence[str],
    examples: Sequence[int],
    pictures: Pictures,
    starts: Sequence[int],
    source: Source,
) -> None:
    """Draw some queries, where all were found, and the film.

    Parameters
    ----------
    path : pathlib.Path
        The file to write; its suffix selects the format.
    answers : Answers
        The answers of all ranks.
    verdicts : sequence of str
        One for each answer.
    examples : sequence of int
        The answers to show.
    pictures : mapping
        From the numbers in `frames_to_draw` to frames, (height, width, 3), uint8.
    starts : sequence of int
        Each rank's first frame, and the number of frames.
    source : Source
        The video searched.
    """
    figure = Figure(figsize=(_WIDTH, _HEIGHT), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    _draw_title(figure, answers, verdicts, starts, source)
    for cell, n in enumerate(examples):
        _draw_example(figure, cell, answers, n, verdicts[n], pictures[int(answers.truth[n, 0])])
    _draw_lanes(figure, answers, verdicts, examples, starts)
    _draw_film(figure, pictures, starts)
    save_picture(figure, path, dpi=_DPI, facecolor=_PAPER)


def _draw_title(
    figure: Figure,
    answers: Answers,
    verdicts: Sequence[str],
    starts: Sequence[int],
    source: Source,
) -> None:
    ranks, tokens = len(starts) - 1, starts[-1] * source.rows * source.cols
    found = f"{verdicts.count(FOUND)} of {len(answers)} noisy patches found among {tokens:,}"
    how = f"LV-XAttn on {ranks} rank{'s' * (ranks > 1)}: queries travel, the video stays"
    _write(figure, 0.35, _HEIGHT - 0.45, found, _INK, 19, weight="bold")
    _write(figure, 0.35, _HEIGHT - 0.77, f"{how}  ·  {source.title}", _DIM, 11.5)


def _draw_example(
    figure: Figure, cell: int, answers: Answers, n: int, verdict: str, frame: NDArray[np.uint8]
) -> None:
    """Draw a patch, the frame it was found in, and a beam from one to the other."""
    width, height, side, gap = (_WIDTH - 0.43) / COLS, 2.28, 1.0, 0.24
    left = 0.35 + cell % COLS * width
    top = _HEIGHT - 1.25 - cell // COLS * height  # of the pictures; the captions are above
    asker, holder = int(answers.asker[n]), int(answers.holder[n])
    number, row, col = (int(axis) for axis in answers.truth[n])
    shape = frame.shape[0] / frame.shape[1]
    wide = min((height - 0.47) / shape, width - side - gap - 0.2)
    beside = left + side + gap

    patch_axes = _panel(figure, left, top - side, side, side, _colour(asker))
    patch_axes.imshow(answers.seen[n], interpolation="nearest")
    frame_axes = _panel(figure, beside, top - wide * shape, wide, wide * shape, _colour(holder))
    frame_axes.imshow(frame, interpolation="bilinear", aspect="auto")
    x, y, box = col * PATCH - 2, row * PATCH - 2, PATCH + 3  # the box does not cover the patch
    style = "-" if verdict == FOUND else ":"
    for colour, line in ((_PAPER, 4.5), (_INK, 2.2)):
        outline = Rectangle((x, y), box, box, fill=False, ec=colour, lw=line, ls=style)
        frame_axes.add_patch(outline)
    for down in (0, 1):
        ends = (PATCH - 0.5, down * PATCH - 0.5), (x, y + down * box)
        beam = ConnectionPatch(
            *ends, "data", "data", axesA=patch_axes, axesB=frame_axes, color=_INK, alpha=0.6
        )
        figure.add_artist(beam)

    asks = f"{_letter(cell)}  rank {asker} asks"
    says = f"found on rank {holder}" if verdict == FOUND else f"{verdict}; truth on rank {holder}"
    _write(figure, left, top + 0.07, asks, _colour(asker), 10, weight="bold")
    _write(figure, beside, top + 0.07, says, _colour(holder), 10, weight="bold")
    where = f"frame {number:,}", f"row {row}, col {col}", f"weight {answers.weight[n]:.3f}"
    for line_number, text in enumerate(where):
        _write(figure, left, top - side - 0.22 - 0.165 * line_number, text, _DIM, 9.5)


def _draw_lanes(
    figure: Figure,
    answers: Answers,
    verdicts: Sequence[str],
    examples: Sequence[int],
    starts: Sequence[int],
) -> None:
    """Draw a lane for each asking rank, with a mark at each frame where a query was found."""
    ranks, bottom, height = len(starts) - 1, 1.12, 1.0
    _write(figure, _LEFT, bottom + height + 0.07, "where each rank's queries lie:", _DIM, 9.5)
    _write(figure, _LEFT + 2.1, bottom + height + 0.07, "|  found    o  ambiguous", _INK, 9.5)
    axes = _panel(figure, _LEFT, bottom, _WIDTH - _LEFT - 0.35, height, None)
    axes.set_xlim(0, starts[-1])
    axes.set_ylim(ranks - 0.5, -0.5)
    for rank in range(ranks):
        axes.axvspan(starts[rank], starts[rank + 1], color=_colour(rank), alpha=0.12, lw=0)
        axes.axhline(rank, color=_DIM, linewidth=0.5, alpha=0.4)
        if ranks <= _NAMED:
            y = bottom + height * (1 - (rank + 0.5) / ranks) - 0.05
            _write(figure, 0.35, y, f"rank {rank} asks", _colour(rank), 9.5)
    for n, verdict in enumerate(verdicts):
        mark = {FOUND: "|", AMBIGUOUS: "o"}.get(verdict, "X")
        axes.plot(
            answers.truth[n, 0] + 0.5,
            answers.asker[n],
            mark,
            color=_colour(int(answers.asker[n])),
            markersize=9 if verdict == FOUND else 5,
            fillstyle="none",
        )
    for cell, n in enumerate(examples):
        colour = _colour(int(answers.asker[n]))
        axes.annotate(
            _letter(cell),
            (answers.truth[n, 0] + 0.5, answers.asker[n]),
            color=_PAPER,
            fontsize=9,
            fontweight="bold",
            ha="center",
            va="center_baseline",
            bbox={"boxstyle": "circle,pad=0.18", "facecolor": colour, "edgecolor": _PAPER},
        )


def _draw_film(figure: Figure, pictures: Pictures, starts: Sequence[int]) -> None:
    """Draw the video as a strip of film over a bar that shows which rank holds it."""
    axes = _panel(figure, _LEFT, 0.2, _WIDTH - _LEFT - 0.35, 0.86, None)
    end = starts[-1]
    axes.add_patch(Rectangle((0, 0.26), end, 0.74, color="black", linewidth=0, zorder=-1))
    shown = film_frames(end)
    step = end / len(shown)
    for n, number in enumerate(shown):
        box = (n + 0.03) * step, (n + 0.97) * step, 0.36, 0.90
        axes.imshow(pictures[number][::2, ::2], extent=box, aspect="auto")
    holes = (np.arange(6 * len(shown)) + 0.5) * step / 6
    for y in (0.30, 0.95):
        axes.plot(holes, np.full(len(holes), y), "s", color=_DIM, markersize=2)
    for rank, (first, last) in enumerate(pairwise(starts)):
        bar = Rectangle((first, 0), last - first, 0.2, facecolor=_colour(rank), edgecolor=_PAPER)
        axes.add_patch(bar)
        several = f"s {first:,}–{last - 1:,}" if last - first > 1 else f" {first:,}"
        text = f"rank {rank} holds frame{several}"
        if len(text) * 0.085 > (last - first) / end * (_WIDTH - _LEFT):
            text = str(rank) if len(starts) <= 40 and last > first else ""
        x = (first + last) / 2
        axes.text(x, 0.09, text, color=_PAPER, fontsize=9, weight="bold", ha="center", va="center")
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1)


def _write(
    figure: Figure, x: float, y: float, text: str, colour: str, size: float, weight: str = "normal"
) -> None:
    """Write text at a position in inches from the lower left corner."""
    figure.text(x / _WIDTH, y / _HEIGHT, text, color=colour, fontsize=size, fontweight=weight)


def _panel(
    figure: Figure, left: float, bottom: float, width: float, height: float, edge: str | None
) -> Axes:
    """Add axes without ticks; all lengths are inches from the lower left corner."""
    axes = figure.add_axes((left / _WIDTH, bottom / _HEIGHT, width / _WIDTH, height / _HEIGHT))
    axes.set_facecolor("none")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(edge is not None)
        spine.set_edgecolor(edge or _PAPER)
        spine.set_linewidth(2.5)
    return axes


def _letter(cell: int) -> str:
    return chr(ord("A") + cell)


def _colour(rank: int) -> str:
    return _COLOURS[rank % len(_COLOURS)]
