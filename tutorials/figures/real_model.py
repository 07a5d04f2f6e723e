"""The figures of notebook 9, a real model."""

import matplotlib.pyplot as plt
import numpy as np
from figures import BLUE, DARK_ORANGE, GREEN, INK, LIGHT_GREY, ORANGE, RED, SKY
from matplotlib.colors import ListedColormap


def local_masks(right, wrong):
    """Draw which token sees which frame: as the model means it, and as two ranks make it.

    right, wrong : (tokens, frames), bool
    """
    _, panels = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True)
    colours = ListedColormap(["white", BLUE, RED])
    for axes, shown, title in (
        (panels[0], right.astype(int), "the whole mask"),
        (panels[1], right + 2 * (wrong & ~right), "each rank's part, made by itself"),
    ):
        axes.imshow(shown, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="none")
        axes.set_xticks(np.arange(shown.shape[1] + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(shown.shape[0] + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=LIGHT_GREY, lw=0.6)
        axes.tick_params(which="minor", length=0)
        axes.axvline(shown.shape[1] / 2 - 0.5, color=INK, lw=2.5)
        axes.set_title(title, size=12)
        axes.set(xlabel="frame: rank 0 | rank 1", xticks=[0, 7, 8, 15])
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("token of the text")
    seen = np.argwhere(wrong & ~right)[:, 0].max() + 1
    panels[1].text(11.5, seen + 2.2, "wrong: rows without a\nframe of rank 1 see all", size=9,
                   color="white", va="top", ha="center", weight="bold",
                   bbox={"facecolor": RED, "edgecolor": "none", "pad": 3})  # fmt: skip
    plt.show()


def bytes_by_layer(sent):
    """Draw the bytes that a rank sends in the forward of each layer.

    sent : by schedule and number of frames, four numbers
    """
    _, axes = plt.subplots(figsize=(8, 3.4))
    shades = {("lv-xattn", 16): BLUE, ("lv-xattn", 32): "#7db3e8",
              ("ring", 16): ORANGE, ("ring", 32): "#f5cf8a"}  # fmt: skip
    for place, (key, colour) in enumerate(shades.items()):
        where = np.arange(4) + 0.2 * (place - 1.5)
        kib = np.array(sent[key]) / 1024
        axes.bar(where, kib, width=0.18, color=colour, label=f"{key[0]}, {key[1]} frames")
        for x, y in zip(where, kib, strict=True):
            axes.text(
                x, y * 1.08, f"{y:.0f}" if y > 10 else f"{y:.1f}", ha="center", size=9, color=INK
            )
    names = ("0: self", "1: cross", "2: self", "3: cross")
    axes.set_xticks(range(4), names)
    axes.set(yscale="log", ylim=(3, 800), xlabel="layer, and its attention",
             ylabel="KiB sent by a rank, forward")  # fmt: skip
    axes.legend(frameon=False, ncols=2, loc="upper center", fontsize=10)
    plt.show()


def parts_of_a_step(seconds):
    """Draw the seconds of a step's parts in one process and on each of two ranks.

    seconds : by row, a dictionary of seconds by part, and of those spent waiting
    """
    _, axes = plt.subplots(figsize=(8, 2.9))
    parts = {"tower": SKY, "text": BLUE, "cross": ORANGE, "backward": GREEN,
             "update": LIGHT_GREY}  # fmt: skip
    longest = max(sum(found[part] for part in parts) for found in seconds.values())
    for row, found in enumerate(seconds.values()):
        left = 0.0
        for part, colour in parts.items():
            width = 1e3 * found[part]
            axes.barh(-row, width, left=left, color=colour, edgecolor="white", height=0.62,
                      label=part if row == 0 else None)  # fmt: skip
            left += width
        if found["waiting"]:
            said = f"{1e3 * found['waiting']:.0f} ms of it waiting"
            axes.text(left + 20 * longest, -row, said, va="center", size=10, color=INK)
    axes.set_yticks([0, -1, -2], list(seconds))
    axes.set(xlim=(0, 1.35e3 * longest), ylim=(-2.6, 1.1), xlabel="ms of a training step")
    axes.legend(frameon=False, ncols=5, loc="upper left", fontsize=10)
    axes.spines["left"].set_visible(False)
    plt.show()


def from_layer_to_model(rows, others):
    """Draw what a step with Ring Attention consists of, and the gain over what remains of it.

    rows : list of (name, computing, sum of gradients, step of ring, step of lv-xattn), seconds
    others : list of (share that remains, gain)
    """
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(5, 4))
    for row, (name, computing, summed, ring, lv) in enumerate(rows):
        start = 0.0
        for width, colour in (
            (computing, BLUE), (summed, GREEN), (ring - computing - summed, ORANGE)
        ):  # fmt: skip
            left.barh(-row, 100 * width / ring, left=start, color=colour, height=0.5,
                      edgecolor="white")  # fmt: skip
            start += 100 * width / ring
        left.text(0, -row + 0.3, f"{name}: {ring / lv:.0f} times" if ring > 9 * lv
                  else f"{name}: {ring / lv:.1f} times", size=10, color=INK)  # fmt: skip
    left.text(0, 1.0, "computing", color=BLUE, size=10, weight="bold")
    left.text(27, 1.0, "sum of gradients", color=GREEN, size=10, weight="bold")
    left.text(70, 1.0, "keys and values", color=DARK_ORANGE, size=10, weight="bold")
    left.set(xlim=(0, 100), ylim=(-len(rows) + 0.5, 1.3), yticks=[],
             xlabel="% of a step with Ring Attention")  # fmt: skip
    left.spines["left"].set_visible(False)
    line = np.geomspace(0.01, 1, 50)
    right.loglog(100 * line, 1 / line, color=INK, lw=1.5)
    right.text(1.15, 105, "1 / share", color=INK, size=10)
    right.loglog(*zip(*((100 * share, gain) for share, gain in others), strict=True), "o",
                 color=LIGHT_GREY, ms=6)  # fmt: skip
    for number, (_, computing, summed, ring, lv) in enumerate(rows):
        at = 100 * (computing + summed) / ring, ring / lv
        right.loglog(*at, "o", color=RED, ms=8)
        right.text(1.12 * at[0], 1.08 * at[1], "ABCD"[number], color=RED, size=11, weight="bold")
    right.set(xlim=(1, 110), ylim=(0.9, 150), xlabel="% of the step that is not keys and values",
              ylabel="times faster with LV-XAttn")  # fmt: skip
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
    plt.show()
