"""A picture of a plan: how much faster than Ring Attention, and which schedule wins where."""

from typing import TYPE_CHECKING

import numpy as np

from lvxattn.reference.agreement import SCHEDULES
from lvxattn.reference.plan.choose import refusal
from lvxattn.reference.plan.draw import COLOURS, INK
from lvxattn.reference.plan.machine import Machine
from lvxattn.reference.plan.problem import planned
from lvxattn.reference.plan.problems import Model
from lvxattn.reference.plan.simulate import play

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = tuple(2**n for n in range(15))
FRAMES = tuple(2**n for n in range(12))


def winners(model: Model, machine: Machine, P: int, dtype: str) -> "Figure":
    """Draw, over text tokens and frames, what a training step's cross-attention gains.

    Parameters
    ----------
    model : Model
    machine : Machine
    P : int
    dtype : str

    Returns
    -------
    matplotlib.figure.Figure
        Left: time of Ring Attention over that of LV-XAttn.  Right: the schedule of least time.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    seconds = {s: times(model, machine, P, dtype, s) for s in SCHEDULES}
    figure = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    gain = seconds["ring"] / seconds["lv-xattn"]
    edges = (_edges(TEXT), _edges(FRAMES))
    mesh = left.pcolormesh(
        *edges, gain.T, norm=LogNorm(max(0.5, gain.min()), gain.max()), cmap="cividis"
    )
    figure.colorbar(mesh, ax=left, label="times as fast as Ring Attention")
    for n, text in enumerate(TEXT[::2]):
        for m, frames in enumerate(FRAMES[::2]):
            value = gain[2 * n, 2 * m]
            colour = INK if value > np.sqrt(gain.max()) else "white"
            left.text(text, frames, f"{value:.3g}", ha="center", va="center", size=7, color=colour)
    best = np.argmin([seconds[s] for s in SCHEDULES], axis=0)
    colours = ListedColormap(COLOURS[: len(SCHEDULES)])
    right.pcolormesh(*edges, best.T, cmap=colours, vmin=-0.5, vmax=len(SCHEDULES) - 0.5)
    there = [
        (s, c)
        for n, (s, c) in enumerate(zip(SCHEDULES, COLOURS, strict=False))
        if (best == n).any()
    ]
    right.legend(
        handles=[Patch(color=c, label=s) for s, c in there], loc="upper center", ncols=4,
        bbox_to_anchor=(0.5, -0.17), frameon=False,
    )  # fmt: skip
    left.set_title("LV-XAttn against Ring Attention")
    right.set_title("the schedule of least time")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="text tokens", ylabel="frames")
        axes.set_xticks(TEXT[::2], [f"{n:,}" for n in TEXT[::2]])
        axes.set_yticks(FRAMES[::2], [f"{n:,}" for n in FRAMES[::2]])
    figure.suptitle(f"{model.name} on {machine.name}, {P} ranks: one layer, forward and backward")
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


def _edges(centres: tuple[int, ...]) -> list[float]:
    return [centres[0] / 2**0.5, *(x * 2**0.5 for x in centres)]
