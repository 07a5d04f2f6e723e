"""The figures of notebook 6: what layers store, what recomputation costs, how many frames fit."""

from statistics import median

import matplotlib.pyplot as plt
import numpy as np
from figures import BLUE, GREEN, INK, LIGHT_GREY, ORANGE, PINK, RED, SKY

SHADES = {"features": BLUE, "k": ORANGE, "v": GREEN, "x": PINK, "q": SKY, "out": RED}
MiB, GB = 2**20, 1e9


def stored(variants):
    """Draw the bytes that eight layers store, array by array, for each variant."""
    _, axes = plt.subplots(figsize=(8, 0.6 + 0.8 * len(variants)))
    for row, counted in enumerate(variants.values()):
        left = 0.0
        for what, shade in SHADES.items():
            width = counted.get(what, 0) / MiB
            if width == 0:
                continue
            axes.barh(row, width, left=left, color=shade, edgecolor="white", height=0.7)
            label = "y" if what == "features" else what
            axes.text(
                left + width / 2, row, label, ha="center", va="center", color="white", size=12
            )
            left += width
        axes.text(left + 0.3, row, f"{left:.0f} MiB", va="center", color=INK, size=11)
    axes.set_yticks(range(len(variants)), variants, size=11)
    axes.set(xlim=(0, 30), ylim=(len(variants) - 0.5, -0.5),
             xlabel="stored between forward and backward by 8 layers (MiB; lse is too thin)",
             )  # fmt: skip
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    plt.show()


def increase_of_time(names, ratios, arithmetic):
    """Draw the ratios of step times of each row, their medians, and the increase predicted."""
    _, axes = plt.subplots(figsize=(8, 2.6))
    for place, found in enumerate(ratios):
        axes.plot(100 * (np.array(found) - 1), [-place] * len(found), "o", color=SKY, ms=7)
        axes.plot(100 * (median(found) - 1), -place, "|", color=INK, ms=22, mew=2.5)
    axes.axvline(100 * arithmetic, color=RED, lw=1.5)
    axes.text(100 * arithmetic, 0.62, "arithmetic ", color=RED, size=10, ha="right")
    axes.axvline(8, color=GREEN, lw=1.5, ls="--")
    axes.text(8, 0.62, " the paper's bound", color=GREEN, size=10)
    low = min(min(found) for found in ratios)
    axes.annotate("the outlier", (100 * (low - 1), -0.1), (100 * (low - 1), -0.75), color=INK,
                  ha="center", size=10, arrowprops={"arrowstyle": "-", "color": INK})  # fmt: skip
    axes.set_yticks(range(0, -len(names), -1), names, size=10)
    axes.set(ylim=(0.4 - len(names), 1.0),
             xlabel="increase of step time (%): pairs of steps, and the median")  # fmt: skip
    axes.spines["left"].set_visible(False)
    plt.show()


def steps_in_order(steps, pair):
    """Draw the times of steps in the order in which they were run, and mark one pair.

    Steps are (kind, seconds); of each two that follow one another, one recomputes.
    """
    _, axes = plt.subplots(figsize=(8, 3))
    seconds = [taken for _, taken in steps]
    axes.plot(seconds, color=LIGHT_GREY, lw=1.2, zorder=1)
    for kind, colour, name in (("kept", RED, "stored"), ("recomputed", BLUE, "recomputed")):
        at = [n for n, (found, _) in enumerate(steps) if found == kind]
        axes.plot(at, [seconds[n] for n in at], "o", color=colour, ms=7, label=name)
    axes.axvspan(2 * pair - 0.5, 2 * pair + 1.5, color=SKY, alpha=0.25, lw=0)
    axes.text(2 * pair + 1.7, max(seconds), "the pair of the outlier", va="center", color=INK)
    axes.set(xlabel="step, in the order of measurement", ylabel="seconds of a step", ylim=(0, 0.4),
             xticks=range(0, len(steps), 2))  # fmt: skip
    axes.legend(frameon=False, loc="lower right", ncols=2)
    plt.show()


def where_to_checkpoint(variants):
    """Draw what each variant stores, and the arithmetic and the bytes sent that it adds.

    Variants are name: (bytes stored, arithmetic added, bytes sent added).
    """
    _, panels = plt.subplots(1, 3, figsize=(8, 2.2), sharey=True)
    titles = "stored (MiB)", "more arithmetic (%)", "more bytes sent (%)"
    for axes, title, values, colour in zip(
        panels, titles, zip(*variants.values(), strict=True), (BLUE, ORANGE, GREEN), strict=True
    ):
        unit = 1 / MiB if "MiB" in title else 100
        shown = [unit * value for value in values]
        axes.barh(range(len(shown)), shown, color=colour, height=0.6)
        for row, value in enumerate(shown):
            axes.text(value + 0.02 * max(shown), row, f"{value:.0f}", va="center", color=INK)
        axes.set(xlim=(0, 1.25 * max(shown)), xticks=(), ylim=(len(shown) - 0.5, -0.5))
        axes.set_title(title, size=11)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].set_ylabel("recomputed")
    plt.show()


def frames_that_fit(frames, totals, fit, room):
    """Draw the bytes of a rank by frames of the video, and where they reach its memory."""
    _, axes = plt.subplots(figsize=(8, 3.6))
    for (name, total), colour in zip(totals.items(), (RED, BLUE), strict=True):
        axes.plot(frames, np.array(total) / GB, color=colour, lw=2.2)
        axes.plot(fit[name], room / GB, "o", color=colour, ms=8)
        axes.text(fit[name] + 250, 73, f"{fit[name]:,} frames\n{name}", color=colour, va="top")
    axes.axhline(room / GB, color=INK, lw=1.2, ls="--")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.text(frames[-1], 82, "80 GB", color=INK, ha="right")
    axes.set(xlim=(0, frames[-1]), ylim=(0, 110), xlabel="frames of the video",
             ylabel="GB on each of 16 ranks")  # fmt: skip
    plt.show()


def ratios_of_models(ratio, layers):
    """Draw how many times as many frames fit, by model, with the number of layers."""
    _, axes = plt.subplots(figsize=(8, 3.2))
    names = sorted(ratio, key=lambda name: ratio[name])
    for place, name in enumerate(names):
        axes.barh(place, ratio[name], color=BLUE, height=0.62)
        text = f"{ratio[name]:.2f}, {layers[name]} layers"
        axes.text(ratio[name] + 0.08, place, text, va="center", color=INK)
    axes.set_yticks(range(len(names)), names, size=10)
    axes.axvline(1.6, color=RED, lw=1.8)
    axes.text(1.66, len(names) - 0.45, "the paper: 1.6", color=RED)
    axes.set(xlim=(0, 10.5), ylim=(-0.6, len(names)),
             xlabel="times as many frames with recomputation")  # fmt: skip
    plt.show()
