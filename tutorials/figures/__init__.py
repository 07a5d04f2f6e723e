"""The notebooks' figures: one module for each, and the colours and the style that all share.

Importing it sets matplotlib's style.
"""

import matplotlib.pyplot as plt

from lvxattn.draw.rotation import COLOURS, INK

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = COLOURS
DARK_ORANGE = "#A66F00"  # for text
LIGHT_GREY = "#C9CED6"

__all__ = [
    "BLUE", "COLOURS", "DARK_ORANGE", "GREEN", "GREY", "INK", "LIGHT_GREY", "ORANGE", "PINK",
    "RED", "SKY", "YELLOW",
]  # fmt: skip

plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11,
    "axes.spines.top": False, "axes.spines.right": False,
})  # fmt: skip
