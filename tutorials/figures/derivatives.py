"""The figures of notebook 5: gradients, how they are checked, and how they travel."""

import matplotlib.pyplot as plt
import numpy as np
from figures import BLUE, COLOURS, GREEN, INK, LIGHT_GREY, ORANGE, RED, SKY
from matplotlib.patches import Ellipse, Rectangle

from lvxattn.common.wire import BLOCKS
from lvxattn.draw.rotation import follow

DASHED = (0, (4, 3))


def jacobian(weights, derivatives):
    """Draw the weights of eight keys, and their derivatives as numbers on colours."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 4), width_ratios=(2, 5), sharey=True)
    left.barh(range(8), weights, color=BLUE, height=0.8)
    left.set(xlabel="weight i", ylabel="key i", yticks=range(8), xlim=(0, 0.36))
    right.imshow(derivatives, cmap="PuOr_r", vmin=-0.25, vmax=0.25, aspect="auto")
    for (i, j), value in np.ndenumerate(derivatives):
        colour = "white" if value > 0.15 else INK
        right.text(j, i, f"{value:+.3f}", ha="center", va="center", size=9.5, color=colour)
    right.set(xlabel="score j", xticks=range(8))
    right.set_title("derivative of weight i with respect to score j", size=12)
    right.tick_params(length=0)
    right.spines[["left", "bottom"]].set_visible(False)
    plt.show()


def errors_of_differences(steps, errors):
    """Draw the errors of central differences for q, k and v, by step."""
    _, axes = plt.subplots(figsize=(8, 3.9))
    for (name, error), colour in zip(errors.items(), (BLUE, GREEN, ORANGE), strict=True):
        axes.loglog(steps, error, "o-", color=colour, lw=2, ms=4)
        beside = {"q": 4, "k": 0.2, "v": 1}[name] * error[-1]  # the first two are almost the same
        axes.text(0.12, beside, f"$d{name}$", color=colour, size=14, va="center")
    axes.loglog(steps[-7:], 3e-3 * steps[-7:] ** 2, color=INK, lw=1, ls=DASHED)
    axes.loglog(steps[:10], 3e-18 / steps[:10], color=INK, lw=1, ls=DASHED)
    axes.text(1e-3, 3e-10, r"$h^2$", color=INK, size=13)
    axes.text(1.3e-10, 1.2e-10, "$1/h$", color=INK, size=13)
    axes.set(xlabel="step h", ylabel="error of the difference", xlim=(6e-11, 0.2))
    plt.show()


def weights_by_rank(weights, part_of):
    """Draw the weights of keys on four ranks, and their sums over each rank's keys."""
    _, (left, right) = plt.subplots(
        1, 2, figsize=(8, 3.4), width_ratios=(24, 11), sharey=True
    )  # fmt: skip
    left.pcolormesh(weights, cmap="Greys", edgecolor="white", lw=0.5)
    start = np.zeros(8)
    for rank, colour in enumerate(COLOURS[:4]):
        left.add_patch(Rectangle((6 * rank, -0.45), 6, 0.4, color=colour, lw=0, clip_on=False))
        left.text(6 * rank + 3, -0.62, f"keys of rank {rank}", color=colour, ha="center", size=11)
        left.axvline(6 * rank, color=INK, lw=1.5)
        right.barh(np.arange(8) + 0.5, part_of[rank], left=start, color=colour, height=0.85)
        start += part_of[rank]
    left.set(xlabel="key", ylabel="query", ylim=(8, 0), yticks=np.arange(8) + 0.5,
             yticklabels=range(8), xticks=range(0, 25, 6))  # fmt: skip
    right.set(xlabel="weight of each rank's keys", xlim=(0, 1))
    right.set_title("sum: 1", size=11)
    plt.show()


def bytes_of_a_backward(rows_sent, ring):
    """Draw the bytes that a rank sends: of q, dout and dq by row, with out, and of the ring."""
    _, axes = plt.subplots(figsize=(8, 3.1))
    bytes_of = {"q": 256, "dout": 256, "lse, delta": 8, "dq": 512}
    with_out = {"q": 256, "dout": 256, "lse": 4, "out": 256, "dq": 512}
    shade = {"q": BLUE, "dout": SKY, "dq": GREEN, "out": RED}
    inside = {"ha": "center", "va": "center", "color": "white", "size": 13}
    for bar, pieces in enumerate((bytes_of, with_out)):
        start = 0
        for name, row in pieces.items():
            width = rows_sent * row / 1e6
            axes.barh(bar, width, left=start, color=shade.get(name, INK), height=0.6)
            if name in shade:
                axes.text(start + width / 2, bar, name, **inside)
            start += width
    axes.set(yticks=(0, 1, 2), yticklabels=("LV-XAttn", "LV-XAttn with out", "Ring Attention"),
             xlim=(0, 78), ylim=(2.5, -0.5),
             xlabel="MB sent by a rank in one layer's backward")  # fmt: skip
    axes.barh(2, 78, color=LIGHT_GREY, height=0.6)
    times = round(ring / (rows_sent * sum(bytes_of.values())))
    axes.text(77, 2, f"{ring / 1e6:,.0f} MB: the bar is {times} times as long as the first →",
              ha="right", va="center", color=INK, size=11)  # fmt: skip
    axes.tick_params(axis="y", length=0)
    plt.show()


def journey_of_dq(log):
    """Draw where each block is at each hop of a backward on four ranks, and what its dq contains.

    The log says which rank computes with whose queries at which hop.
    """
    P = 4
    _, axes = plt.subplots(figsize=(8, 4.6))
    at_home = {(hop, rank): rank for hop in (0, P) for rank in range(P)}
    for (hop, rank), owner in {**at_home, **follow(log, BLOCKS)}.items():
        _draw_stop(axes, P, hop, rank, owner)
    arrow = {"arrowstyle": "-|>", "color": BLUE, "lw": 2}
    for hop in (1, 2):
        axes.annotate("", (hop + 0.7, hop + 1.2), (hop + 0.29, hop + 0.26), arrowprops=arrow)
    axes.plot((3.29, 3.5), (3.26, 3.55), color=BLUE, lw=2)
    axes.annotate("", (3.72, 0.2), (3.5, -0.42), arrowprops=arrow)
    axes.set(xlim=(-0.45, P + 0.4), ylim=(P - 0.4, -0.5), xticks=range(P + 1),
             xticklabels=["owner", "hop 1", "hop 2", "hop 3", "owner"], yticks=range(P),
             yticklabels=[f"rank {n}\n$k_{n}\\ v_{n}$" for n in range(P)])  # fmt: skip
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    for text, colour in zip(axes.get_yticklabels(), COLOURS, strict=False):
        text.set_color(colour)
    axes.spines[["left", "bottom"]].set_visible(False)
    plt.show()


def _draw_stop(axes, P, hop, rank, owner):
    """Draw a block on a rank, and below it the ranks that have added to its dq."""
    bold = owner == 0
    disc = Ellipse((hop, rank - 0.1), 0.34, 0.4, color=COLOURS[owner], alpha=1 if bold else 0.3)
    axes.add_patch(disc)
    text = {"ha": "center", "va": "center", "color": "white" if bold else INK, "size": 13}
    axes.text(hop, rank - 0.1, f"$q_{owner}$", **text)
    there = {(owner + n) % P for n in range(1, hop + 1)}
    for keys in range(P):
        edge = INK if bold else LIGHT_GREY
        style = {"fc": COLOURS[keys] if keys in there else "none", "ec": edge}
        corner = hop - 0.26 + 0.13 * keys, rank + 0.17
        axes.add_patch(Rectangle(corner, 0.12, 0.14, alpha=1 if bold else 0.4, **style))


def error_by_ranks(ranks, dtypes, measured, once):
    """Draw the error of dq by ranks for each dtype, in the band that rounding predicts."""
    _, axes = plt.subplots(figsize=(8, 4))
    for (name, (_, u)), colour in zip(dtypes.items(), (BLUE, GREEN, ORANGE), strict=True):
        low, high = (u * np.sqrt((ranks - 1) / (2 * part)) for part in (12, 3))
        axes.fill_between(ranks, low, high, color=colour, alpha=0.25, lw=0)
        axes.loglog(ranks, measured[name], "o-", color=colour, lw=2, ms=5)
        axes.text(35, measured[name][-1], name, color=colour, size=13, va="center")
    axes.axhline(once, color=INK, lw=1.2, ls=DASHED)
    axes.annotate("rounding the result once,\nat the end, to bf16", (2.3, once), (2, 8e-3),
                  color=INK, size=11,
                  arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.8})  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set(xlabel="P, ranks", ylabel="relative error of dq", xlim=(1.8, 50), ylim=(5e-9, 0.06),
             xticks=ranks, xticklabels=ranks)  # fmt: skip
    plt.show()
