"""Draw a forward hop by hop, from the messages that were really sent.

One row per rank, one column per hop.  A box is keys and values, a disc is queries, small squares
are the ranks whose keys a result covers; the colour is the owner's.

    film_strip    the whole pass, schedules side by side
    animation     the same, moving
"""

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lvxattn.common.wire import BLOCKS, RESULTS
from lvxattn.draw.rotation import COLOURS, INK, blank, follow
from lvxattn.reference.virtual_ranks import Message

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Milliseconds of a frame of the animation: with moving blocks, with resting ones, and the last.
_MOVING, _STANDING, _LAST = 90, 900, 2500
_MOVES = 3  # frames of a moving block
_SIZE = 11  # of letters, in points, where there is room
_TITLES = {"lv-xattn": "LV-XAttn: queries travel", "ring": "Ring Attention: keys travel"}


class Scene(NamedTuple):
    """The work of a rank at one hop.

    Attributes
    ----------
    owner : int
        Owner of the block that is here.
    joined : tuple of int
        Ranks whose keys the result then covers: with lv-xattn that of the visiting queries, which
        leaves after them, with ring that of the rank's own queries.
    """

    owner: int
    joined: tuple[int, ...]


def scenes(schedule: str, log: list[Message]) -> list[list[Scene]]:
    """Return the work of every rank at every hop, from the messages of a forward.

    Parameters
    ----------
    schedule : str
        ``"lv-xattn"`` or ``"ring"``.
    log : list of Message
        Of one forward, as written by `run_ranks`.

    Returns
    -------
    list of list of Scene
        By hop and rank; with lv-xattn the last column is home again.

    Raises
    ------
    ValueError
        The schedule is no ring, or the messages are not those of one forward.
    """
    if schedule not in _TITLES:
        raise ValueError(f"schedule: expected one of {', '.join(_TITLES)}, got {schedule!r}")
    P = 1 + max((message.source for message in log), default=0)
    kinds = (BLOCKS, RESULTS) if schedule == "lv-xattn" else (BLOCKS,)
    found = sorted((message.tag, message.source) for message in log)
    if P == 1 or found != sorted((tag, r) for tag in kinds for r in range(P) for _ in range(P - 1)):
        raise ValueError(
            f"log: expected P - 1 messages of each kind from every rank in a forward of {schedule},"
            f" got {len(log)} messages"
        )
    visits, trips = follow(log, BLOCKS), follow(log, RESULTS, first_hop=1)
    columns = [[Scene(rank, (rank,)) for rank in range(P)]]
    # The ranks whose keys a result covers, by the owner of its queries.
    covers: dict[int, tuple[int, ...]] = dict.fromkeys(range(P), ())
    for hop in range(1, P):
        column = []
        for rank in range(P):
            owner = visits[hop, rank]
            if schedule == "lv-xattn":
                came = covers[trips[hop, rank]] if hop > 1 else ()
                column.append(Scene(owner, (*came, rank)))
            else:
                column.append(Scene(owner, (*columns[-1][rank].joined, owner)))
        covers = {scene.owner: scene.joined for scene in column}
        columns.append(column)
    if schedule == "lv-xattn":
        columns.append([Scene(rank, (rank, *covers[trips[P, rank]])) for rank in range(P)])
    return columns


def film_strip(logs: Mapping[str, list[Message]]) -> "Figure":
    """Draw forwards hop by hop, schedules side by side.

    Parameters
    ----------
    logs : mapping
        By schedule, ``"lv-xattn"`` or ``"ring"``, the messages of one forward; 2 to 8 ranks.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        As `scenes`, or there are more ranks than colours.
    """
    films = _films(logs)
    widths = [len(columns) + 1.2 for columns in films.values()]
    P = max(len(columns[0]) for columns in films.values())
    cell = min(1.2, 10 / sum(widths))  # inches
    figure = blank(cell * sum(widths), cell * (P + 0.6) + 0.4, dpi=80)
    panels = figure.subplots(1, len(films), squeeze=False, width_ratios=widths)[0]
    for axes, (schedule, columns) in zip(panels, films.items(), strict=True):
        _strip(axes, schedule, columns, min(_SIZE, 13.5 * cell))
    return figure


def animation(logs: Mapping[str, list[Message]]) -> bytes:
    """Return an animated PNG of forwards, schedules side by side.

    Parameters
    ----------
    logs : mapping
        As given to `film_strip`.

    Returns
    -------
    bytes
        For a file, or for ``IPython.display.Image(data=..., format="png")``.

    Raises
    ------
    ValueError
        As `film_strip`.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    films = _films(logs)
    # Without an engine, whatever the style asks for; matplotlib's types lack it.
    none: Any = "none"
    figure = Figure(figsize=(4 * len(films), 4.6), dpi=90, facecolor="white", layout=none)
    panels = figure.subplots(1, len(films), squeeze=False)[0]
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.93, 0.02)
    pictures, times = [], []
    hops = max(map(len, films.values()))
    for hop, blocks, results in _instants(hops):
        for axes, (schedule, columns) in zip(panels, films.items(), strict=True):
            axes.clear()
            _ring(axes, schedule, columns, hop, blocks, results)
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
        pictures.append(Image.open(drawn).convert("RGB"))
        times.append(_MOVING if 0 < blocks < 1 or 0 < results < 1 else _STANDING)
    times[-1] = _LAST
    file = BytesIO()
    # One palette for all of them; the last picture has all colours.
    palette = pictures[-1].quantize(64, dither=Image.Dither.NONE)
    first, *others = (x.quantize(palette=palette, dither=Image.Dither.NONE) for x in pictures)
    first.save(file, "PNG", save_all=True, append_images=others, duration=times, loop=0)
    return file.getvalue()


def step(schedule: str, hops: int, hop: int, *, results: bool) -> str:
    """Return a frame's caption: which step of the pass it shows, and what happens in it.

    Parameters
    ----------
    schedule : str
        ``"lv-xattn"`` or ``"ring"``.
    hops, hop : int
        Of the pass, which has two steps for each, and of the frame.
    results : bool
        Whether blocks have arrived, and the frame shows the results.

    Examples
    --------
    >>> step("lv-xattn", hops=4, hop=2, results=True)
    'step 4 of 8: results follow'
    """
    if hop == 0:
        return f"step 0 of {2 * hops}: at home"
    if schedule == "ring":
        happens = "attend and merge" if results else "keys and values move"
    elif hop == hops:  # nothing but results is left on the way
        happens = "results come home" if results else "the last results leave"
    else:
        happens = "queries move" if not results else "attend" if hop == 1 else "results follow"
    return f"step {2 * hop - 1 + results} of {2 * hops}: {happens}"


def _films(logs: Mapping[str, list[Message]]) -> dict[str, list[list[Scene]]]:
    films = {schedule: scenes(schedule, log) for schedule, log in logs.items()}
    P = max((len(columns[0]) for columns in films.values()), default=0)
    if not 2 <= P <= len(COLOURS):
        raise ValueError(f"logs: expected forwards of 2 to {len(COLOURS)} ranks, got {P}")
    return films


def _strip(axes: "Axes", schedule: str, columns: list[list[Scene]], size: float) -> None:
    P, queries = len(columns[0]), schedule == "lv-xattn"
    axes.set(xlim=(-1.6, len(columns) - 0.4), ylim=(P - 0.4, -1.0), aspect="equal")
    axes.axis("off")
    axes.set_title(_TITLES[schedule], size=size + 2, color=INK)
    titles = ["home", *(f"hop {hop}" for hop in range(1, P)), "home\nagain"][: len(columns)]
    for column, title in enumerate(["stays", *titles], start=-1):
        axes.text(column, -0.52, title, ha="center", va="bottom", size=0.9 * size, color=INK)
    for rank in range(P):
        axes.axhspan(rank - 0.44, rank + 0.44, color=COLOURS[rank], alpha=0.12, lw=0)
        _block(axes, (-1.0, rank), rank, size, queries=not queries)
    for column, scenes_ in enumerate(columns):
        for rank, (owner, joined) in enumerate(scenes_):
            _block(axes, (column, rank - 0.08), owner, size, queries=queries)
            _result(axes, (column, rank + 0.32), joined)


def _block(
    axes: "Axes", at: tuple[float, float], owner: int, size: float, *, queries: bool
) -> None:
    """Draw a block: a disc for queries, a box for keys and values."""
    from matplotlib.patches import Ellipse, Rectangle

    x, y = at
    style: dict[str, Any] = {"fc": COLOURS[owner], "lw": 0, "zorder": 3}
    if queries:
        axes.add_patch(Ellipse(at, 0.56, 0.56, **style))
    else:
        axes.add_patch(Rectangle((x - 0.31, y - 0.25), 0.62, 0.5, **style))
    name = f"$q_{owner}$" if queries else f"$k_{owner}\\,v_{owner}$"
    colour = INK if COLOURS[owner] == "#F0E442" else "white"  # dark on yellow
    place: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
    axes.text(x, y, name, size=size, zorder=4, color=colour, **place)


def _result(axes: "Axes", at: tuple[float, float], joined: tuple[int, ...]) -> None:
    """Draw a small square for each rank whose keys a result covers."""
    from matplotlib.patches import Rectangle

    side = min(0.15, 0.8 / max(1, len(joined)))
    left = at[0] - side * len(joined) / 2
    for n, rank in enumerate(joined):
        corner = (left + n * side, at[1] - 0.07)
        axes.add_patch(Rectangle(corner, side, 0.14, fc=COLOURS[rank], ec="white", lw=1, zorder=5))


def _instants(hops: int) -> list[tuple[int, float, float]]:
    """Return the frames: a hop, and the fractions of it that blocks and results have moved."""
    steps = [n / _MOVES for n in range(1, _MOVES + 1)]
    found = [(0, 1.0, 1.0)]
    for hop in range(1, hops):
        found += [(hop, step, 0.0) for step in steps]
        found += [(hop, 1.0, step) for step in steps]
    return found


def _ring(
    axes: "Axes",
    schedule: str,
    columns: list[list[Scene]],
    hop: int,
    blocks: float,
    results: float,
) -> None:
    """Draw one frame: ranks on a circle, with their own blocks outside and visitors inside."""
    P, queries = len(columns[0]), schedule == "lv-xattn"
    if hop >= len(columns):  # the other schedule takes longer
        hop, blocks, results = len(columns) - 1, 1.0, 1.0
    now, before = columns[hop], columns[max(0, hop - 1)]
    came_from = {scene.owner: rank for rank, scene in enumerate(before)}
    over = hop == len(columns) - 1 and results == 1
    state = "home" if hop == 0 else "done" if over else "home\nagain" if hop == P else f"hop {hop}"
    axes.set(xlim=(-3, 3), ylim=(-3.4, 3.1), aspect="equal")
    axes.axis("off")
    axes.set_title(_TITLES[schedule], size=_SIZE + 2, color=INK)
    axes.text(0, 0, state, ha="center", va="center", size=_SIZE, color=INK)
    says = step(schedule, len(columns) - 1, hop, results=results > 0)
    axes.text(0, -3.25, says, ha="center", va="center", size=_SIZE, color=INK)
    for rank, (owner, joined) in enumerate(now):
        x, y = _place(rank, P, 2.35)
        axes.text(x, y + 0.44, f"rank {rank}", ha="center", va="center", size=9, color=INK)
        _block(axes, (x, y), rank, _SIZE, queries=not queries)
        start = came_from[owner]
        # In the end a rank's own queries are at home, where they have always been.
        way = 1.0 if hop == P else blocks
        _block(axes, _place(_between(start, rank, P, way), P, 1.4), owner, _SIZE, queries=queries)
        if not queries:
            _result(axes, (x, y - 0.46), joined if results == 1 else before[rank].joined)
        elif results == 1:
            _result(axes, _place(rank, P, 0.8), joined)
        elif hop > 1:
            there = _place(_between(start, rank, P, results), P, 0.8)
            _result(axes, there, before[start].joined)


def _place(rank: float, P: int, radius: float) -> tuple[float, float]:
    """Return the position of a rank: rank 0 on top, the others clockwise."""
    angle = 2 * np.pi * rank / P
    return radius * float(np.sin(angle)), radius * float(np.cos(angle))


def _between(start: int, end: int, P: int, part: float) -> float:
    """Return the place on the circle of a block between two ranks."""
    return start + part * ((end - start) % P)
