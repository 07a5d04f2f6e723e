"""The figures of notebook 1, merging softmax."""

import matplotlib.pyplot as plt
import numpy as np
from figures import BLUE, DARK_ORANGE, INK, ORANGE, RED


def window_of_scores(levels, plain, safe):
    """Draw the error of softmax over a constant in its scores, with and without the maximum."""
    _, axes = plt.subplots(figsize=(8, 3.6))
    broken = np.isnan(plain)
    axes.semilogy(levels, plain, color=ORANGE, lw=2.5)
    axes.semilogy(levels, safe, color=BLUE, lw=2.5)
    for lost in (levels[broken & (levels < 0)], levels[broken & (levels > 0)]):
        axes.axvspan(lost[0], lost[-1], color=ORANGE, alpha=0.18, lw=0)
        axes.text(lost.mean(), 3e-2, "NaN", color=RED, size=13, ha="center", weight="bold")
    axes.text(-93, 2e-3, "exp(s), then divide:\nunderflow", color=DARK_ORANGE, size=12)
    axes.text(78, 2e-3, "exp(s), then divide:\noverflow", color=DARK_ORANGE, size=12, ha="right")
    axes.text(0, 1.5e-6, "exp(s - max s), then divide", color=BLUE, ha="center", size=12)
    axes.set(xlim=(-130, 130), ylim=(3e-8, 1), xlabel="constant added to all scores",
             ylabel="largest error of out in fp32")  # fmt: skip
    plt.show()


def weight_of_a_part(difference, weight):
    """Draw the weight of one of two parts over the difference of their lse."""
    _, axes = plt.subplots(figsize=(8, 3.6))
    line = np.linspace(-2.4, 2.4, 200)
    axes.plot(line, 1 / (1 + np.exp(-line)), color=BLUE, lw=2)
    axes.plot(difference.ravel(), weight.ravel(), "o", color=INK, ms=4.5)
    axes.axhline(0.5, color=ORANGE, lw=2)
    axes.text(-2.3, 0.53, "mean: weight 1/2", color=DARK_ORANGE, size=12)
    axes.text(1.3, 0.9, r"$1 / (1 + e^{-(\mathrm{lse}_a - \mathrm{lse}_b)})$", color=BLUE,
              size=13, ha="right")  # fmt: skip
    axes.text(1.2, 0.66, "dots: the 64 queries,\nfrom full_attention", color=INK, size=11,
              va="center")  # fmt: skip
    axes.set(xlim=(-2.4, 2.4), ylim=(0, 1), xlabel=r"$\mathrm{lse}_a - \mathrm{lse}_b$",
             ylabel="weight of part a")  # fmt: skip
    plt.show()


def phantom_key(true_lse, relative, passes, usual):
    """Draw the error of an accumulator that starts at lse = 0, and where a test misses it."""
    _, axes = plt.subplots(figsize=(8, 3.8))
    axes.axvspan(true_lse[passes][0] - 0.25, 12, color=ORANGE, alpha=0.18, lw=0)
    axes.semilogy(true_lse, 1 / (1 + np.exp(true_lse)), color=BLUE, lw=2)
    axes.semilogy(true_lse, relative, "o", color=INK, ms=4.5)
    axes.axvline(usual, color=INK, lw=1, ls=(0, (4, 3)))
    axes.text(usual + 0.1, 2e-2, "lse of 4,096 keys,\nrandom scores", color=INK, size=11)
    axes.text(6.75, 0.2, "allclose(atol=1e-2)\npasses", color=DARK_ORANGE, size=12, ha="center")
    axes.text(-3.8, 0.2, r"$1 / (1 + e^{\mathrm{lse}})$", color=BLUE, size=13)
    axes.set(xlabel="true lse", ylabel="relative error of out", xlim=(-4, 12))
    plt.show()


def dead_rows(visible, lses):
    """Draw a mask beside the lse of every token, over the keys of each part and merged."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=(16, 7), sharey=True)
    left.pcolormesh(visible, cmap="Blues", vmin=0, vmax=2, edgecolor="white", lw=1)
    for start in (4, 8, 12):
        left.axvline(start, color=INK, lw=2)
    table = np.stack(lses, axis=1)
    right.set_facecolor("#E4E4E4")
    right.pcolormesh(np.where(np.isinf(table), np.nan, table), cmap="Blues", vmin=-3, vmax=8,
                     edgecolor="white", lw=1)  # fmt: skip
    for (row, column), value in np.ndenumerate(table):
        text = "-inf" if np.isinf(value) else f"{value:.1f}"
        right.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=9.5, color=INK)
    right.axvline(4, color=INK, lw=2)
    left.set(title="mask: frames that a token may see", xlabel="frame", ylabel="token",
             ylim=(8, 0), yticks=np.arange(8) + 0.5, yticklabels=range(8),
             xticks=np.arange(0, 16, 4) + 0.5, xticklabels=range(0, 16, 4))  # fmt: skip
    right.set(title="lse", xticks=np.arange(5) + 0.5,
              xticklabels=["part 0", "1", "2", "3", "merged"])  # fmt: skip
    plt.show()


def rounding_by_order(errors):
    """Draw how many orders have which error, in units of u."""
    _, axes = plt.subplots(figsize=(8, 3.4))
    bins = np.arange(0, np.ceil(max(map(max, errors))) + 3, 2)
    axes.hist(errors, bins, color=(BLUE, ORANGE), label=("100 chains", "100 trees"))
    axes.legend(frameon=False, loc="upper right")
    axes.set(xlabel=r"largest error of out, in units of $u = 2^{-53}$, relative to the largest out",
             ylabel="number of orders", xlim=(0, bins[-1]))  # fmt: skip
    plt.show()
