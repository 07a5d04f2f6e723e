"""Figures of notebook 3: bytes by the number of ranks, and when sending early gains time."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from figures import BLUE, GREEN, INK, ORANGE

Spans = Sequence[tuple[float, float]]


def bytes_by_ranks(numbers: Sequence[int], sent: Mapping[str, Sequence[int]]) -> None:
    """Draw the bytes that one rank sends over the number of ranks, a line for each schedule."""
    _, axes = plt.subplots(figsize=(8, 2.8))
    for (schedule, of_a_rank), colour in zip(sent.items(), (BLUE, ORANGE), strict=True):
        kilobytes = [nbytes / 1000 for nbytes in of_a_rank]
        axes.plot(numbers, kilobytes, "o-", color=colour, lw=2)
        axes.text(numbers[-1], kilobytes[-1], f"  {schedule}", va="center", color=INK)
    axes.set(xlabel="ranks", ylabel="kilobytes sent by a rank", xticks=numbers)
    plt.show()


def two_passes(passes: Mapping[str, tuple[Spans, Spans, float]]) -> None:
    """Draw a rank's work and its link over time, for each way to send."""
    end = max(done for _, _, done in passes.values())
    _, rows = plt.subplots(len(passes), 1, figsize=(8, 1.3 * len(passes) + 0.5), sharex=True)
    for axes, (name, (working, sending, done)) in zip(rows, passes.items(), strict=True):
        for row, (spans, colour) in enumerate(((working, BLUE), (sending, GREEN))):
            bars = [(start, stop - start) for start, stop in spans]
            axes.broken_barh(bars, (row - 0.35, 0.7), facecolor=colour, edgecolor="white")
        axes.axvline(done, color=INK, lw=1.2, ls=(0, (4, 3)))
        axes.set_title(f"{name}: done after {done:g}", loc="left", size=11, color=INK)
        axes.set(xlim=(0, end * 1.01), ylim=(1.7, -0.5))
        axes.set_yticks((0, 1), ("works", "link busy"))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    rows[-1].set_xlabel("time (1: attention from a block to a rank's keys)")
    plt.show()


def gain(ratios: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    """Draw the time of sending together over that of sending early, over transfer / work."""
    _, axes = plt.subplots(figsize=(8, 3))
    for (name, values), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
        axes.plot(ratios, values, color=colour, lw=2, label=name)
    axes.axhline(1, color=INK, lw=0.8)
    axes.text(ratios[-1], 0.97, "below 1 early is slower", size=9, color=INK, ha="right", va="top")
    axes.set(xscale="log", xlabel="time of transfer / time of work", ylabel="together / early")
    axes.legend(frameon=False, fontsize=10)
    plt.show()
