"""Figures of the notebook on a kernel and a cluster of one's own: errors, times, plans."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from figures import BLUE, INK, ORANGE, PINK, RED


def errors(rows: Sequence[Any]) -> None:
    """Draw each case's error relative to its limit, wrong ones in another colour."""
    wrong = [row.status == "wrong" for row in rows]
    ratios = [min(max(row.worst.ratio, 3e-3), 300) for row in rows]
    _, axes = plt.subplots(figsize=(8, 6), dpi=90)
    axes.axvline(1, color=INK, lw=1)
    axes.text(1.1, -0.8, "the limit", color=INK, va="bottom")
    axes.scatter(ratios, range(len(rows)), c=[RED if bad else BLUE for bad in wrong], s=28)
    for n, bad in enumerate(wrong):
        if bad:
            text = "far above the limit "
            axes.text(250, n, text, color=RED, ha="right", va="center", weight="bold")
    axes.set_yticks(range(len(rows)), [row.case for row in rows], size=8)
    axes.set(xscale="log", xlim=(2e-3, 500), ylim=(len(rows), -1))
    axes.set_xlabel("error / limit (at the left edge: no error)")
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    plt.show()


def beside_the_plan(
    measured: Mapping[tuple[int, int], Mapping[str, float]],
    predicted: Mapping[tuple[int, int], Mapping[str, float]],
) -> None:
    """Draw the seconds of every schedule as bars, and the plan's as marks on them."""
    _, panels = plt.subplots(1, len(measured), figsize=(9, 2.8), sharey=True)
    for axes, (sizes, seconds) in zip(panels, measured.items(), strict=True):
        for n, (schedule, took) in enumerate(seconds.items()):
            axes.barh(n, 1e3 * took, color=BLUE, height=0.6)
            planned = 1e3 * predicted[sizes][schedule]
            axes.plot([planned, planned], [n - 0.42, n + 0.42], color=ORANGE, lw=4)
        axes.set_yticks(range(len(seconds)), list(seconds))
        axes.set_title("{:,} queries, {:,} keys".format(*sizes), size=11, color=INK)
        axes.set_xlabel("milliseconds")
        axes.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    (bar,) = panels[0].barh(0, 0, color=BLUE)
    (mark,) = panels[0].plot([], [], color=ORANGE, lw=4)
    panels[0].figure.legend(
        [bar, mark], ["measured", "planned"], loc="outside upper center", ncols=2, frameon=False
    )
    plt.show()


def gains(tokens: Sequence[int], played: Sequence[Mapping[str, float]], title: str) -> None:
    """Draw by text length how many times as fast as Ring Attention two schedules are."""
    _, axes = plt.subplots(figsize=(8, 4), dpi=90)
    for schedule, colour, place in (("lv-xattn", BLUE, 5), ("gather", PINK, 1)):
        gain = [seconds["ring"] / seconds[schedule] for seconds in played]
        axes.plot(tokens, gain, "o-", color=colour)
        axes.text(tokens[place], 1.25 * gain[place], schedule, color=colour, weight="bold")
    axes.axhline(1, color=ORANGE)
    axes.text(tokens[0], 1.1, "ring", color=ORANGE, weight="bold")
    axes.set(xscale="log", yscale="log", xlabel="text tokens", ylabel="times as fast as ring")
    axes.set_xticks(tokens[::2], [f"{n:,}" for n in tokens[::2]])
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.set_title(title, size=11, color=INK)
    plt.show()
