"""Figures of the notebook on training: clips, loss curves, and wrong shards."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from figures import BLUE, GREEN, INK, LIGHT_GREY, ORANGE, RED
from numpy.typing import ArrayLike, NDArray

LOSS = "loss (nats per question)"


def clip(pictures: ArrayLike, markers: ArrayLike, question: ArrayLike, asked: int) -> None:
    """Draw a clip's frames, each with its marker, and beside them a question."""
    columns = [*zip(np.asarray(pictures), np.asarray(markers), strict=True), (None, question)]
    frames = len(columns) - 1
    _, rows = plt.subplots(2, frames + 1, figsize=(8, 1.5), height_ratios=(4, 1))
    for n, (above, below, (picture, marker)) in enumerate(zip(*rows, columns, strict=True)):
        above.set_title(f"frame {n}" if n < frames else "question", size=9, color=INK)
        if picture is None:
            picture = -np.ones((8, 8))
            above.text(3.5, 3.5, "which\ndigit?", ha="center", va="center", color=RED, size=12)
        above.imshow(picture, cmap="gray_r", vmin=-1, vmax=1)
        below.imshow(np.reshape(marker, (2, 8)), cmap="gray_r", vmin=-1, vmax=1)
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            axes.spines[:].set_color(RED if n in (frames, int(asked)) else LIGHT_GREY)
    plt.show()


def lengths(alone: ArrayLike, growing: ArrayLike, frames: Sequence[float]) -> None:
    """Draw the losses of long clips alone and of clips that grow, with the latter's lengths."""
    _, axes = plt.subplots(figsize=(8, 3.2))
    steps = np.arange(1, len(frames) + 1)
    for first in np.flatnonzero(np.diff(frames, prepend=0)):
        axes.axvline(first + 1, color=LIGHT_GREY, lw=1, zorder=0)
        axes.text(first + 2, 0.08, f"{frames[first]:.0f} frames", color=BLUE, size=9)
    axes.plot(steps, alone, color=ORANGE)
    axes.plot(steps, growing, color=BLUE)
    _guessing(axes, 78)
    axes.text(60, 2.5, f"{frames[-1]:.0f} frames from the first step", color=ORANGE, weight="bold")
    axes.text(56, 1.35, "clips that grow", color=BLUE, weight="bold")
    axes.set(xlabel="step", ylabel=LOSS, ylim=(0, 2.9))
    plt.show()


def one_and_four(one: ArrayLike, four: ArrayLike, rows: Sequence[Mapping[str, str]]) -> None:
    """Draw the first steps on one and on four processes, and the recorded run that they begin."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(2, 3))
    left.plot(range(1, 31), one, color=ORANGE, lw=5, alpha=0.6)
    left.plot(range(1, 31), four, color=BLUE, lw=1.5)
    left.text(1, 1.5, "one process", color=ORANGE, weight="bold")
    left.text(1, 1.3, "four processes", color=BLUE, weight="bold")
    _guessing(left, 0, "ln 10")
    left.set(xlabel="step", ylabel=LOSS, ylim=(0, 2.9))
    steps, loss = ([float(row[name]) for row in rows] for name in ("step", "loss"))
    right.plot(steps, loss, color=BLUE, lw=1)
    right.axvspan(1, 30, color=ORANGE, alpha=0.25, lw=0)
    right.text(34, 2.6, "steps shown on the left", size=9, color=INK)
    for row in rows[50::50]:
        text = f"{row['frames']} frames"
        right.text(float(row["step"]), 1.5, text, size=9, rotation=90, color=INK)
    right.set(xlabel="step", ylabel=LOSS, ylim=(0, 2.9))
    plt.show()


def wrong_shards(
    correct: NDArray[np.float64],
    curves: Mapping[str, NDArray[np.float64]],
    gaps: Mapping[str, NDArray[np.float64]],
) -> None:
    """Draw the losses of wrong shards beside the correct ones, and their relative errors."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    colours = {"correct": BLUE, "dropped": RED, "one_late": GREEN, "reordered": INK}
    steps = np.arange(1, len(correct) + 1)
    for name, found in {**curves, "correct": correct}.items():
        style = {"color": colours[name], "ls": "--" if name == "reordered" else "-", "lw": 1.8}
        smooth = np.convolve(found, np.ones(5) / 5, mode="valid")
        left.plot(steps[2:-2], smooth, **style)
        if name != "reordered":
            label = " correct, reordered" if name == "correct" else f" {name}"
            left.text(49, smooth[-1], label, color=colours[name], va="center", size=9)
        if name != "correct":
            right.semilogy(steps, np.maximum(gaps[name], 1e-17), **style)
            place = {"dropped": 4e-2, "one_late": 8.0, "reordered": 1e-15}[name]
            right.text(51, place, name, color=colours[name], va="center", size=9)
    left.set(xlabel="step", ylabel=f"{LOSS},\nmean of 5 steps", xlim=(0, 75), xticks=[0, 20, 40])
    right.set(xlabel="step", ylabel="relative error of the loss", xlim=(0, 67))
    right.set(xticks=[0, 20, 40], ylim=(1e-17, 100))
    plt.show()


def _guessing(axes: Any, step: float, text: str = "even guesses: ln 10") -> None:
    """Draw the loss of guessing all digits evenly."""
    axes.axhline(np.log(10), color=INK, lw=1, ls=":")
    axes.text(step, np.log(10) - 0.2, text, color=INK, size=9)
