"""Draw bytes as bars on a logarithmic axis: messages of schedules, or memory."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lvxattn.common.handshake import SCHEDULES
from lvxattn.draw.rotation import COLOURS, INK, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 0.34  # of a bar, in units of 100 pixels


def byte_bars(
    groups: Mapping[str, Mapping[str, float]], xlabel: str = "bytes a rank sends"
) -> "Figure":
    """Draw labelled bars on a logarithmic axis.

    Parameters
    ----------
    groups : mapping
        By the name of a group, bytes by the name of a bar.  A schedule has the same colour in all
        pictures; other names take the remaining colours in turn.
    xlabel : str

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        There is no bar, or a size is negative.
    """
    sizes = [size for bars in groups.values() for size in bars.values()]
    if not sizes or min(sizes) < 0:
        raise ValueError(f"groups: expected bars of 0 bytes or more, got {dict(groups)}")
    names = list(dict.fromkeys([*SCHEDULES, *(name for bars in groups.values() for name in bars)]))
    figure, axes = sheet(0.8 + _HEIGHT * (len(sizes) + len(groups)))
    least = min((size for size in sizes if size), default=1.0)
    left, right = 10 ** (len(str(int(least))) - 1.5), max([*sizes, 2 * least])
    y, ticks = 0.0, []
    for group, bars in groups.items():
        axes.text(left, y, f" {group}", va="center", size=11, color=INK, weight="bold")
        for name, size in bars.items():
            y += 1
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axes.barh(y, max(0.0, size - left), 0.78, left, color=colour)
            axes.text(
                max(size, left), y, f"  {format_bytes(size)}", va="center", size=10, color=INK
            )
            ticks.append((y, name))
        y += 1
    axes.set(xscale="log", xlim=(left, right * (right / left) ** 0.18), ylim=(y - 0.4, -0.6))
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel)
    decades = [10**n for n in range(31) if left <= 10**n <= right]
    axes.set_xticks(decades, [format_bytes(x) for x in decades])
    axes.minorticks_off()
    return figure


def format_bytes(size: float, form: str = ".3g") -> str:
    """Format a number of bytes, in B to TB.

    Parameters
    ----------
    size : float
    form : str
        Format of a number of kB and more.

    Returns
    -------
    str

    Examples
    --------
    >>> format_bytes(251_828_961_280)
    '252 GB'
    """
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= least:
            return f"{size / least:{form}} {unit}"
    return f"{size:.0f} B"
