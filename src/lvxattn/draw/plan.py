"""Draw a plan: speed-up over Ring Attention, the fastest schedule, and memory."""

from typing import TYPE_CHECKING

import numpy as np

from lvxattn.common.handshake import SCHEDULES
from lvxattn.draw.rotation import COLOURS, INK, blank
from lvxattn.plan.choose import refusal
from lvxattn.plan.machine import Machine
from lvxattn.plan.memory import memory, most_frames
from lvxattn.plan.models import Model, planned
from lvxattn.plan.simulate import play

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = tuple(2**n for n in range(15))
FRAMES = tuple(2**n for n in range(12))


def winners(
    model: Model, machine: Machine, P: int, dtype: str, text_tokens: int | None = None
) -> "Figure":
    """Draw the time of cross-attention in a training step, over text tokens and frames.

    Parameters
    ----------
    model : Model
    machine : Machine
    P : int
    dtype : str
    text_tokens : int, optional
        Draw memory with so many text tokens, too.

    Returns
    -------
    matplotlib.figure.Figure
        800 pixels wide.  Left: time of Ring Attention over that of LV-XAttn.  Right: the schedule
        of least time.  Below, with `text_tokens`: memory of a rank over frames, with keys and
        values kept and recomputed.
    """
    seconds = {s: times(model, machine, P, dtype, s) for s in SCHEDULES}
    rows = 1 if text_tokens is None else 2
    figure = blank(8, 0.5 + 3.5 * rows)
    grid = figure.add_gridspec(rows, 2)
    left, right = (figure.add_subplot(grid[0, column]) for column in (0, 1))
    _gain(left, seconds["ring"] / seconds["lv-xattn"])
    _best(right, seconds)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="text tokens", ylabel="frames")
        axes.set_xticks(TEXT[::3], [f"{n:,}" for n in TEXT[::3]])
        axes.set_yticks(FRAMES[::2], [f"{n:,}" for n in FRAMES[::2]])
    if text_tokens is not None:
        _fitting(figure.add_subplot(grid[1, :]), model, machine, P, dtype, text_tokens)
    if P == 1:
        right.set_title("one rank: they take the same time")
    ranks = f"{P} rank{'s' * (P > 1)}"
    figure.suptitle(f"{model.name} on {machine.name}, {ranks}: one layer, forward and backward")
    return figure


def times(model: Model, machine: Machine, P: int, dtype: str, schedule: str) -> np.ndarray:
    """Return seconds of a forward and a backward, by text tokens and frames; inf where refused.

    Parameters
    ----------
    model : Model
    machine : Machine
    P : int
    dtype : str
    schedule : str

    Returns
    -------
    (text tokens, frames)
    """
    found = np.full((len(TEXT), len(FRAMES)), np.inf)
    for n, text in enumerate(TEXT):
        for m, frames in enumerate(FRAMES):
            shapes = model.shapes(text, frames)
            layout = planned(*shapes, P, dtype=dtype, schedule=schedule, machine=machine)
            if not refusal(layout):
                found[n, m] = sum(play(layout, machine, backward=b).seconds for b in (False, True))
    return found


def _gain(axes: "Axes", gain: np.ndarray) -> None:
    """Draw the speed-up of LV-XAttn over Ring Attention, as numbers and colours."""
    from matplotlib.colors import LogNorm

    norm = LogNorm(max(0.5, gain.min()), max(1.0, gain.max()), clip=True)
    mesh = axes.pcolormesh(_edges(TEXT), _edges(FRAMES), gain.T, norm=norm, cmap="cividis")
    axes.figure.colorbar(mesh, ax=axes, format="{x:,g}", aspect=30, pad=0.02)
    for n in range(1, len(TEXT), 3):
        for m in range(0, len(FRAMES), 2):
            value = gain[n, m]
            number = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
            axes.text(
                TEXT[n], FRAMES[m], number, size=11, weight="bold", ha="center", va="center",
                color=INK if norm(value) > 0.5 else "white",
            )  # fmt: skip
    axes.set_title("Ring Attention's time over LV-XAttn's")


def _best(axes: "Axes", seconds: dict[str, np.ndarray]) -> None:
    """Draw the schedule of least time."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    best = np.argmin([seconds[s] for s in SCHEDULES], axis=0)
    colours = COLOURS[: len(SCHEDULES)]
    axes.pcolormesh(
        _edges(TEXT), _edges(FRAMES), best.T,
        cmap=ListedColormap(colours), vmin=-0.5, vmax=len(SCHEDULES) - 0.5,
    )  # fmt: skip
    there = [
        Patch(color=colour, label=schedule)
        for n, (schedule, colour) in enumerate(zip(SCHEDULES, colours, strict=True))
        if (best == n).any()
    ]
    axes.legend(
        handles=there, ncols=5, columnspacing=1, handlelength=1, frameon=False,
        loc="upper center", bbox_to_anchor=(0.5, -0.17),
    )  # fmt: skip
    axes.set_title("the schedule of least time")


def _fitting(
    axes: "Axes", model: Model, machine: Machine, P: int, dtype: str, text_tokens: int
) -> None:
    """Draw a rank's memory over frames, and how many frames fit."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    ways = (("kept", False, COLOURS[5]), ("recomputed", True, COLOURS[0]))
    fits = [
        most_frames(model, text_tokens, P, machine.room, dtype=dtype, recompute=recompute)
        for _, recompute, _ in ways
    ]
    most, room = max(*fits, 1), machine.room / 1e9
    frames = np.linspace(0, 1.3 * most, 50).astype(int)
    for (title, recompute, colour), fit, height in zip(ways, fits, (0.16, 0.05), strict=True):
        totals = [
            memory(model, text_tokens, int(n), P, dtype=dtype, recompute=recompute).total / 1e9
            for n in frames
        ]
        axes.plot(frames, totals, color=colour, lw=2)
        axes.plot(fit, room, "o", color=colour)
        text = f"keys, values {title}: {fit:,} frames"
        axes.text(
            0.98, height, text, size=11, weight="bold", ha="right",
            color=colour, transform=axes.transAxes,
        )  # fmt: skip
    axes.axhline(room, color=INK, lw=1, ls="--")
    text = f"all that a rank has: {room:.3g} GB"
    axes.text(0.5, 1.03 * room, text, ha="center", size=11, transform=axes.get_yaxis_transform())
    axes.set(xlim=(0, 1.35 * most), ylim=(0, 1.4 * room), xlabel="frames", ylabel="GB of a rank")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_title(f"what all layers keep, and what fits, {text_tokens:,} text tokens")


def _edges(centres: tuple[int, ...]) -> list[float]:
    return [centres[0] / 2**0.5, *(x * 2**0.5 for x in centres)]
