"""The picture: noisy patches, the frames in which they were found, and who held them.

Each example shows the patch as the asking rank saw it and, joined to it, the frame from which the
attention picked it. The film below is the whole video, coloured by the rank that holds it; the lanes
above it show where each rank's queries were found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import NDArray

from lvxattn.mpi_impl.demo.answers import Answers
from lvxattn.mpi_impl.demo.descriptors import PATCH
from lvxattn.mpi_impl.demo.judge import AMBIGUOUS, FOUND
from lvxattn.mpi_impl.demo.sources import Source

Pictures = Mapping[int, NDArray[np.uint8]]

_ROWS, _COLS = 3, 3
_FILM = 18
"""Pictures on the film."""

_PAPER, _INK, _DIM = "#14171c", "#f2f2ee", "#9aa0a8"
_COLOURS = ("#56b4e9", "#e69f00", "#1fbf92", "#cc79a7", "#f0e442", "#d55e00", "#3d8fd1", "#ffffff")
"""Okabe and Ito's colours, which colour-blind readers tell apart, a little lightened."""

_WIDTH, _HEIGHT = 12.0, 9.7  # inches
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
    """Draw what was asked and where it was found.

    Parameters
    ----------
    path : pathlib.Path
        The file to write; its suffix names the format.
    answers : Answers
        Of all ranks.
    verdicts : sequence of str
        One for each answer.
    examples : sequence of int
        The answers to show, from `choose_examples`.
    pictures : mapping
        From the numbers in `frames_to_draw` to frames, (height, width, 3), uint8.
    starts : sequence of int
        Each rank's first frame, and the number of frames.
    source : Source
        What was searched.
    """
    figure = Figure(figsize=(_WIDTH, _HEIGHT), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    _draw_title(figure, answers, verdicts, starts, source)
    for cell, n in enumerate(examples):
        _draw_example(figure, cell, answers, n, verdicts[n], pictures[int(answers.truth[n, 0])])
    _draw_lanes(figure, answers, verdicts, examples, starts)
    _draw_film(figure, pictures, starts)
    figure.savefig(path, dpi=_DPI, facecolor=_PAPER)


def check_output(path: Path) -> None:
    """Raise ValueError if the picture cannot be written."""
    suffixes = sorted(f".{name}" for name in FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--output: expected a name that ends in {' '.join(suffixes)}; got {path}")
    if path.is_dir() or not path.parent.is_dir():
        problem = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ValueError(f"--output: expected a file in a folder that exists; got {path}: {problem}")
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(f"--output: expected a file that can be written; {error}") from error


def choose_examples(answers: Answers, verdicts: Sequence[str]) -> list[int]:
    """Choose answers to show: spread over the video, over askers and holders; one ambiguous."""
    found = [n for n, verdict in enumerate(verdicts) if verdict == FOUND]
    other = [n for n, verdict in enumerate(verdicts) if verdict != FOUND]
    room = _ROWS * _COLS
    found.sort(key=lambda n: int(answers.truth[n, 0]))
    wanted = min(len(found), room - bool(other))
    chosen: list[int] = []
    for part in range(wanted):  # of each part of the video, the asker shown least, then most texture
        share = found[part * len(found) // wanted : (part + 1) * len(found) // wanted]
        asked = [int(answers.asker[n]) for n in chosen]
        chosen.append(
            min(
                share,
                key=lambda n: (asked.count(int(answers.asker[n])), -float(answers.seen[n].std())),
            )
        )
    return chosen + other[: room - len(chosen)][:1]


def frames_to_draw(answers: Answers, examples: Sequence[int], frames: int) -> list[int]:
    """List the numbers of the frames that `draw` shows, ascending."""
    return sorted({*_film_frames(frames), *(int(answers.truth[n, 0]) for n in examples)})


def _film_frames(frames: int) -> list[int]:
    """Give the number of the middle frame of each part of the film."""
    shown = min(_FILM, frames)
    return [(2 * n + 1) * frames // (2 * shown) for n in range(shown)]


def _draw_title(
    figure: Figure,
    answers: Answers,
    verdicts: Sequence[str],
    starts: Sequence[int],
    source: Source,
) -> None:
    ranks, tokens = len(starts) - 1, starts[-1] * source.rows * source.cols
    x = 0.35 / _WIDTH
    figure.text(
        *(x, 1 - 0.42 / _HEIGHT),
        f"{verdicts.count(FOUND)} of {len(answers)} noisy patches found among {tokens:,}",
        **{"color": _INK, "fontsize": 19, "fontweight": "bold"},
    )
    figure.text(
        *(x, 1 - 0.72 / _HEIGHT),
        f"LV-XAttn on {ranks} rank{'s' * (ranks > 1)}: queries travel, the video stays.  {source.title}",
        **{"color": _DIM, "fontsize": 11.5},
    )


def _draw_example(
    figure: Figure, cell: int, answers: Answers, n: int, verdict: str, frame: NDArray[np.uint8]
) -> None:
    """Draw a patch, the frame it was found in, and a beam from one to the other."""
    width, height = (_WIDTH - 0.5) / _COLS, 2.25
    left = 0.35 + cell % _COLS * width
    bottom = _HEIGHT - 1.1 - (cell // _COLS + 1) * height + 0.28
    asker, holder = int(answers.asker[n]), int(answers.holder[n])
    number, row, col = (int(axis) for axis in answers.truth[n])
    tall = height - 0.52
    wide = min(tall * frame.shape[1] / frame.shape[0], width - 1.35)

    patch_axes = _panel(figure, left, bottom + tall - 0.95, 0.95, 0.95, _colour(asker))
    patch_axes.imshow(answers.seen[n], interpolation="nearest")
    shown_tall = wide * frame.shape[0] / frame.shape[1]
    frame_axes = _panel(
        figure, left + 1.13, bottom + tall - shown_tall, wide, shown_tall, _colour(holder)
    )
    frame_axes.imshow(frame, interpolation="bilinear", aspect="auto")
    corner = col * PATCH - 0.5, row * PATCH - 0.5
    line = {"fill": False, "linestyle": "-" if verdict == FOUND else (0, (2, 1.5))}
    frame_axes.add_patch(Rectangle(corner, PATCH, PATCH, edgecolor=_PAPER, linewidth=4, **line))
    frame_axes.add_patch(Rectangle(corner, PATCH, PATCH, edgecolor=_INK, linewidth=2, **line))
    for y in (0, 1):
        beam = ConnectionPatch(
            *((PATCH - 0.5, y * PATCH - 0.5), (corner[0], corner[1] + y * PATCH), "data", "data"),
            **{"axesA": patch_axes, "axesB": frame_axes, "color": _INK, "alpha": 0.55},
        )
        figure.add_artist(beam)

    letter = chr(ord("A") + cell)
    top = (bottom + tall + 0.08) / _HEIGHT
    style = {"fontsize": 11, "fontweight": "bold", "va": "bottom"}
    figure.text(left / _WIDTH, top, f"{letter}  rank {asker}", color=_colour(asker), **style)
    says = "found on" if verdict == FOUND else f"{verdict} on"
    figure.text(
        *((left + 1.13) / _WIDTH, top, f"{says} rank {holder}"), color=_colour(holder), **style
    )
    weight = f"weight\n{answers.weight[n]:.3f}"
    figure.text(
        *(left / _WIDTH, (bottom + tall - 1.03) / _HEIGHT, f"frame\n{number:,}\n{weight}"),
        **{"color": _DIM, "fontsize": 9.5, "va": "top", "linespacing": 1.25},
    )


def _draw_lanes(
    figure: Figure,
    answers: Answers,
    verdicts: Sequence[str],
    examples: Sequence[int],
    starts: Sequence[int],
) -> None:
    """Draw a lane for each asking rank, with a mark at each frame where a query was found."""
    ranks = len(starts) - 1
    axes = _panel(figure, 1.35, 0.98, _WIDTH - 1.7, 0.95, None)
    axes.set_xlim(0, starts[-1])
    axes.set_ylim(ranks - 0.5, -0.5)
    for rank in range(ranks):
        axes.axvspan(starts[rank], starts[rank + 1], color=_colour(rank), alpha=0.12, linewidth=0)
        axes.axhline(rank, color=_DIM, linewidth=0.5, alpha=0.4)
        if ranks <= 8:
            axes.text(
                *(-0.006, rank, f"rank {rank} asks"),
                **{"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"},
                **{"color": _colour(rank), "fontsize": 9.5},
            )
    for n, verdict in enumerate(verdicts):
        x, y, colour = answers.truth[n, 0] + 0.5, answers.asker[n], _colour(int(answers.asker[n]))
        if verdict == FOUND:
            axes.plot(x, y, "|", color=colour, markersize=9, markeredgewidth=1.3)
        else:
            mark = "o" if verdict == AMBIGUOUS else "X"
            axes.plot(x, y, mark, color=colour, markersize=5, fillstyle="none")
    for cell, n in enumerate(examples):
        axes.text(
            *(answers.truth[n, 0] + 0.5, answers.asker[n], chr(ord("A") + cell)),
            **{"color": _PAPER, "fontsize": 9, "fontweight": "bold", "ha": "center"},
            **{"va": "center_baseline", "clip_on": False},
            bbox={
                "boxstyle": "circle,pad=0.18",
                "facecolor": _colour(int(answers.asker[n])),
                "edgecolor": _PAPER,
            },
        )


def _draw_film(figure: Figure, pictures: Pictures, starts: Sequence[int]) -> None:
    """Draw the video as a strip of film over a bar that shows who holds it."""
    axes = _panel(figure, 1.35, 0.2, _WIDTH - 1.7, 0.72, None)
    axes.set_xlim(0, starts[-1])
    axes.set_ylim(0, 1)
    axes.add_patch(Rectangle((0, 0.26), starts[-1], 0.74, color="black", linewidth=0))
    shown = _film_frames(starts[-1])
    step = starts[-1] / len(shown)
    for n, number in enumerate(shown):
        small = pictures[number][::2, ::2]
        box = (n + 0.03) * step, (n + 0.97) * step, 0.36, 0.90
        axes.imshow(small, extent=box, aspect="auto", interpolation="antialiased")
    holes = (np.arange(6 * len(shown)) + 0.5) * step / 6
    for y in (0.30, 0.95):
        axes.plot(holes, np.full(len(holes), y), "s", color=_DIM, markersize=2)
    axes.set_xlim(0, starts[-1])
    axes.set_ylim(0, 1)
    for rank, (first, last) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        axes.add_patch(
            Rectangle((first, 0), last - first, 0.2, facecolor=_colour(rank), edgecolor=_PAPER)
        )
        if last - first >= starts[-1] / 10:
            axes.text(
                *((first + last) / 2, 0.09, f"rank {rank} holds frames {first:,}–{last - 1:,}"),
                **{"color": _PAPER, "fontsize": 9, "ha": "center", "va": "center"},
                fontweight="bold",
            )


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


def _colour(rank: int) -> str:
    return _COLOURS[rank % len(_COLOURS)]
