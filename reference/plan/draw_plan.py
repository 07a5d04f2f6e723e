"""A picture of a plan: how much faster than Ring Attention, which schedule wins, and what fits."""

from typing import TYPE_CHECKING

import numpy as np

from lvxattn.reference.agreement import SCHEDULES
from lvxattn.reference.plan.choose import refusal
from lvxattn.reference.plan.draw import COLOURS, INK
from lvxattn.reference.plan.machine import Machine
from lvxattn.reference.plan.memory import memory, most_frames
from lvxattn.reference.plan.problem import planned
from lvxattn.reference.plan.problems import Model
from lvxattn.reference.plan.simulate import play

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = tuple(2**n for n in range(15))
FRAMES = tuple(2**n for n in range(12))


def winners(
    model: Model, machine: Machine, P: int, dtype: str, text_tokens: int | None = None
) -> "Figure":
    """Draw, over text tokens and frames, what a training step's cross-attention gains and takes.

    Parameters
    ----------
    model : Model
    machine : Machine
    P : int
    dtype : str
    text_tokens : int, optional
        With so many of them memory is drawn, too.

    Returns
    -------
    matplotlib.figure.Figure
        Left: time of Ring Attention over that of LV-XAttn.  Middle: the schedule of least time.
        Right, if asked for: memory of a rank over frames, with keys and values kept and made again.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    seconds = {s: times(model, machine, P, dtype, s) for s in SCHEDULES}
    panels = 2 if text_tokens is None else 3
    figure = Figure(figsize=(5.2 * panels, 4.6), facecolor="white", layout="constrained")
    left, middle, *right = figure.subplots(1, panels)
    gain = seconds["ring"] / seconds["lv-xattn"]
    edges = (_edges(TEXT), _edges(FRAMES))
    mesh = left.pcolormesh(
        *edges, gain.T, norm=LogNorm(max(0.5, gain.min()), gain.max()), cmap="cividis"
    )
    figure.colorbar(mesh, ax=left, label="times as fast as Ring Attention")
    for n, text in list(enumerate(TEXT))[1::3]:
        for m, frames in list(enumerate(FRAMES))[::2]:
            value = gain[n, m]
            colour = INK if value > np.sqrt(gain.max()) else "white"
            number = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
            left.text(text, frames, number, ha="center", va="center", size=9, color=colour)
    best = np.argmin([seconds[s] for s in SCHEDULES], axis=0)
    colours = ListedColormap(COLOURS[: len(SCHEDULES)])
    middle.pcolormesh(*edges, best.T, cmap=colours, vmin=-0.5, vmax=len(SCHEDULES) - 0.5)
    there = [
        (s, c)
        for n, (s, c) in enumerate(zip(SCHEDULES, COLOURS, strict=False))
        if (best == n).any()
    ]
    middle.legend(
        handles=[Patch(color=c, label=s) for s, c in there], loc="upper center", ncols=4,
        bbox_to_anchor=(0.5, -0.17), frameon=False,
    )  # fmt: skip
    left.set_title("LV-XAttn against Ring Attention")
    middle.set_title("the schedule of least time")
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="text tokens", ylabel="frames")
        axes.set_xticks(TEXT[::3], [f"{n:,}" for n in TEXT[::3]])
        axes.set_yticks(FRAMES[::2], [f"{n:,}" for n in FRAMES[::2]])
    title = f"{model.name} on {machine.name}, {P} ranks: one layer, forward and backward"
    if text_tokens is not None:
        _fitting(right[0], model, machine, P, dtype, text_tokens)
        title += "; memory of all layers"
    figure.suptitle(title)
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
            layout = planned(*model.shapes(text, frames), P, dtype=dtype, schedule=schedule)
            if not refusal(layout):
                found[n, m] = sum(play(layout, machine, backward=b).seconds for b in (False, True))
    return found


def _fitting(
    axes: "Axes", model: Model, machine: Machine, P: int, dtype: str, text_tokens: int
) -> None:
    """Draw what a rank's memory takes over frames, and how many fit."""
    ways = (("kept", False, COLOURS[5]), ("made again", True, COLOURS[0]))
    fits = {
        title: most_frames(
            model, text_tokens, P, machine.room, dtype=dtype, recompute=recompute
        )
        for title, recompute, _ in ways
    }  # fmt: skip
    frames = np.linspace(0, 1.3 * max(*fits.values(), 1), 50).astype(int)
    for (title, recompute, colour), height in zip(ways, (0.12, 0.05), strict=True):
        totals = [
            memory(model, text_tokens, int(n), P, dtype=dtype, recompute=recompute).total
            for n in frames
        ]
        axes.plot(frames, np.array(totals) / 1e9, color=colour, lw=2)
        axes.plot(fits[title], machine.room / 1e9, "o", color=colour)
        text = f"keys, values {title}: {fits[title]:,} frames"
        axes.text(0.97, height, text, color=colour, ha="right", transform=axes.transAxes)
    axes.axhline(machine.room / 1e9, color=INK, lw=1, ls="--")
    axes.set(
        xlim=(0, 1.35 * max(*fits.values(), 1)), ylim=(0, 1.4 * machine.room / 1e9),
        xlabel="frames", ylabel="GB of a rank",
    )  # fmt: skip
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(f"what fits, {text_tokens:,} text tokens")


def _edges(centres: tuple[int, ...]) -> list[float]:
    return [centres[0] / 2**0.5, *(x * 2**0.5 for x in centres)]
