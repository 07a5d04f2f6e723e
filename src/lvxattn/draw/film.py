"""A pass as a film: who works on what at every hop, drawn from what was really sent.

One row a rank, one column a hop.  A box is keys and values, a disc is queries, small squares are
the ranks whose keys a result already covers; the colour is the owner's.

    film_strip    the whole pass, schedules side by side
    animation     the same, moving
"""

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lvxattn.common.wire import BLOCKS, NAMES, RESULTS
from lvxattn.draw.rotation import COLOURS, INK, follow
from lvxattn.reference.virtual_ranks import Message

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# How long a picture of the animation stands, in milliseconds: one that is on its way, one that is
# to be read, and the last one.
_MOVING, _STANDING, _LAST = 90, 900, 2500
_MOVES = 3  # pictures of a block on its way
_SIZE = 11  # of letters, in points, where there is room


class Scene(NamedTuple):
    """What a rank works on at one hop.

    Attributes
    ----------
    owner : int
        Whose block is here; the rank's own at home.
    joined : tuple of int
        Whose keys are in the result once the work is done: with lv-xattn the visiting queries'
        result, which leaves after them, with ring that of the rank's own queries.
    """

    owner: int
    joined: tuple[int, ...]


def scenes(schedule: str, log: list[Message]) -> list[list[Scene]]:
    """Return what every rank works on, by hop and rank, from a forward's messages.

    Parameters
    ----------
    schedule : str
        ``"lv-xattn"`` or ``"ring"``.
    log : list of Message
        As `run_ranks` writes it, of one forward.

    Returns
    -------
    list of list of Scene
        With lv-xattn the last column is home again.

    Raises
    ------
    ValueError
        There is no such ring, or the messages are not those of one forward.
    """
    if schedule not in NAMES:
        raise ValueError(f"schedule: expected one of {', '.join(NAMES)}, got {schedule!r}")
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
    # What a result covers, by the owner of its queries.
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
    """Draw a forward hop by hop, one schedule beside the other.

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
    from matplotlib.figure import Figure

    films = _films(logs)
    widths = [len(columns) + 1.2 for columns in films.values()]
    P = max(len(columns[0]) for columns in films.values())
    cell = min(1.2, 10 / sum(widths))  # inches
    figure = Figure(
        figsize=(cell * sum(widths), cell * (P + 0.6) + 0.4),
        dpi=80,
        facecolor="white",
        layout="constrained",
    )
    panels = figure.subplots(1, len(films), squeeze=False, width_ratios=widths)[0]
    for axes, (schedule, columns) in zip(panels, films.items(), strict=True):
        _strip(axes, schedule, columns, min(_SIZE, 13.5 * cell))
    return figure


def animation(logs: Mapping[str, list[Message]]) -> bytes:
    """Draw a forward as an animated PNG, which pages show wherever they show a PNG.

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
    figure = Figure(figsize=(4 * len(films), 4.3), dpi=90, facecolor="white")
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


def _films(logs: Mapping[str, list[Message]]) -> dict[str, list[list[Scene]]]:
    films = {schedule: scenes(schedule, log) for schedule, log in logs.items()}
    P = max((len(columns[0]) for columns in films.values()), default=0)
    if not 2 <= P <= len(COLOURS):
        raise ValueError(f"logs: expected forwards of 2 to {len(COLOURS)} ranks, got {P}")
    return films


def _title(schedule: str) -> str:
    return {"lv-xattn": "LV-XAttn: queries travel", "ring": "Ring Attention: keys travel"}[schedule]


def _strip(axes: "Axes", schedule: str, columns: list[list[Scene]], size: float) -> None:
    P, queries = len(columns[0]), schedule == "lv-xattn"
    axes.set(xlim=(-1.6, len(columns) - 0.4), ylim=(P - 0.4, -1.0), aspect="equal")
    axes.axis("off")
    axes.set_title(_title(schedule), size=size + 2, color=INK)
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
    colour = COLOURS[owner]
    patch = (
        Ellipse(at, 0.56, 0.56, fc=colour, lw=0, zorder=3)
        if queries
        else Rectangle((x - 0.31, y - 0.25), 0.62, 0.5, fc=colour, lw=0, zorder=3)
    )
    axes.add_patch(patch)
    text: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": _letters(owner)}
    name = f"$q_{owner}$" if queries else f"$k_{owner}\\,v_{owner}$"
    axes.text(x, y, name, size=size, zorder=4, **text)


def _result(axes: "Axes", at: tuple[float, float], joined: tuple[int, ...]) -> None:
    """Draw which ranks' keys a result covers: a small square for each."""
    from matplotlib.patches import Rectangle

    side = min(0.15, 0.8 / max(1, len(joined)))
    left = at[0] - side * len(joined) / 2
    for n, rank in enumerate(joined):
        corner = (left + n * side, at[1] - 0.07)
        axes.add_patch(Rectangle(corner, side, 0.14, fc=COLOURS[rank], ec="white", lw=1, zorder=5))


def _letters(owner: int) -> str:
    """Return the colour of letters on a rank's colour: dark where that is yellow."""
    return INK if COLOURS[owner] == "#F0E442" else "white"


def _instants(hops: int) -> list[tuple[int, float, float]]:
    """Return the animation's instants: a hop, and how far blocks and results have come on it."""
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
    """Draw one instant; ranks lie on a circle, what stays outside and what travels inside."""
    P, queries = len(columns[0]), schedule == "lv-xattn"
    if hop >= len(columns):  # the other schedule takes longer
        hop, blocks, results = len(columns) - 1, 1.0, 1.0
    now, before = columns[hop], columns[max(0, hop - 1)]
    came_from = {scene.owner: rank for rank, scene in enumerate(before)}
    over = hop == len(columns) - 1 and results == 1
    state = "home" if hop == 0 else "done" if over else "home\nagain" if hop == P else f"hop {hop}"
    axes.set(xlim=(-3, 3), ylim=(-2.9, 3.1), aspect="equal")
    axes.axis("off")
    axes.set_title(_title(schedule), size=_SIZE + 2, color=INK)
    axes.text(0, 0, state, ha="center", va="center", size=_SIZE, color=INK)
    for rank, (owner, joined) in enumerate(now):
        x, y = _place(rank, P, 2.35)
        axes.text(x, y + 0.44, f"rank {rank}", ha="center", va="center", size=9, color=INK)
        _block(axes, (x, y), rank, _SIZE, queries=not queries)
        start = came_from[owner]
        # At the end a rank's own queries are where they have always been.
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
    """Return where a rank is: rank 0 on top, the others clockwise."""
    angle = 2 * np.pi * rank / P
    return radius * float(np.sin(angle)), radius * float(np.cos(angle))


def _between(start: int, end: int, P: int, part: float) -> float:
    """Return where on the circle a block is that has come so far from one rank to the next."""
    return start + part * ((end - start) % P)
