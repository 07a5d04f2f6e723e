"""Every schedule over text and video lengths, measured and predicted by the plan.

    python benchmarks/schedules.py [--quick] [--store DIR] [--plot FILE] [--again FILE]

On 1 Gbit/s links and in shared memory, P = 2 and 4, heads grouped and not, forward and backward,
one BLAS thread a rank; and, on P = 4 and 8, two heads, which ulysses cannot deal out, on links of
20 Mbit/s, where two cores for all ranks matter less.  The grid is P / 2 x 2: those of P = 2 are
lv-xattn and ring.  Before each cell the machine measures itself, as `lvxattn.mpi_impl.measure` does
for users: the memory of a virtual machine may be twice as fast a few minutes later.  From these
figures alone the plan predicts the time of every schedule, and `auto` chooses.  Both are then
compared with the measurements.

Prints a table in Markdown; `--store` writes it, and every single measurement as JSON, to DIR;
`--plot` draws the fastest schedules; `--again` reads the measurements from a file instead.
Exit status 2 where no cluster can be built (`netlab/lab.py` says what that needs).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import Results, describe_run, exit_without_lab, parser_for, publish
from network import in_shared_memory, on_hosts
from network_report import SMALL, Goal, rate, typical

from lvxattn.common.handshake import SCHEDULES
from lvxattn.draw.rotation import COLOURS, INK
from lvxattn.plan import Machine, play
from lvxattn.plan.models import planned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

S_Q, S_KV = (1, 64, 1024, 8192), (4096, 16384, 65536)
SQUARES = (4096, 8192, 16384)
QUICK_S_Q, QUICK_S_KV = (1, 128), (4096,)
HEADS = ((4, 4), (4, 2))
D = 64
SLOW, FEW_HEADS = "20mbit", 2
SLOW_SIZES = ((512, 4096), (2048, 2048), (4096, 4096), (2048, 8192))
LONG = 8192 * 16384
"""Queries times keys of the largest cells: more take minutes a cell."""
WORST, PREDICTED, FURTHEST, WINS = 1.10, 1.05, 1.4, 1.3
"""The goals: auto over the best; factor of predicted and measured, in the median and at most; and
the lead that the plan gives to the grid where it has to win."""


def measure(quick: bool) -> list[Results]:
    """Measure every cell of every sweep."""
    found: list[Results] = []
    for P in (2, 4):
        for heads in HEADS[: 1 if quick else None]:
            works = sweep(P, *heads, sizes(quick=quick), quick=quick)
            # The plan and Ring Attention are compared well enough in fewer of its long turns.
            found += on_hosts(P, "1gbit", [{**work, "ring_every": 3} for work in works])
            found += in_shared_memory(P, works)
    if not quick:
        for P in (4, 8):
            found += on_hosts(P, SLOW, sweep(P, FEW_HEADS, FEW_HEADS, SLOW_SIZES, least=3))
    return found


def sizes(*, quick: bool) -> list[tuple[int, int]]:
    """Return the lengths, S_Q and S_KV, of the cells."""
    if quick:
        return [(s_q, s_kv) for s_kv in QUICK_S_KV for s_q in QUICK_S_Q]
    every = {*((s_q, s_kv) for s_kv in S_KV for s_q in S_Q), *((s, s) for s in SQUARES)}
    found = sorted(every, key=lambda size: (size[1], size[0]))
    return [size for size in found if size[0] * size[1] <= LONG]


def sweep(
    P: int,
    H: int,
    H_KV: int,
    sizes: Sequence[tuple[int, int]],
    *,
    quick: bool = False,
    least: int = 1,
) -> list[Results]:
    """Return the arguments of one run of `passes.py`, of at least so many rounds."""
    refused = {"ulysses"} if H_KV % P else set()
    if P < 4:
        refused.add("grid")
    common = {"H": H, "H_KV": H_KV, "D": D, "backward": True, "rounds": 9, "least": least}
    return [
        {
            **common, "S_Q": s_q, "S_KV": s_kv, "seconds": 0.5 if quick else 6, "machine": True,
            "kinds": [s for s in SCHEDULES if s not in refused],
        }
        for s_q, s_kv in sizes
    ]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One problem on one machine: seconds by schedule, forward and backward.

    Attributes
    ----------
    of : dict
        The measurement.
    measured, predicted : dict
    """

    of: Results
    measured: dict[str, float]
    predicted: dict[str, float]

    @staticmethod
    def read(r: Results) -> "Cell":
        """Return a cell's measured times, with the plan's predictions."""
        machine = Machine.of(r["machine"])
        q, k = (1, r["H"], r["S_Q"], r["D"]), (1, r["H_KV"], r["S_KV"], r["D"])
        predicted = {}
        for schedule in r["turns"]:
            layout = planned(q, k, r["P"], dtype="float32", schedule=schedule)
            if schedule == "grid":
                layout = replace(layout, grid=(r["P"] // 2, 2))
            passes = (play(layout, machine, backward=b) for b in (False, True))
            predicted[schedule] = sum(played.seconds for played in passes)
        return Cell(r, {kind: typical(r, kind, "total") for kind in r["turns"]}, predicted)

    @property
    def best(self) -> str:
        """Return the fastest schedule as measured."""
        return min(self.measured, key=lambda s: self.measured[s])

    @property
    def auto(self) -> str:
        """Return the schedule that the plan chooses."""
        return min(self.predicted, key=lambda s: self.predicted[s])

    @property
    def lead_of_grid(self) -> float:
        """Return the time of the best other schedule over that of the grid, as predicted."""
        others = min(seconds for s, seconds in self.predicted.items() if s != "grid")
        return others / self.predicted["grid"] if "grid" in self.predicted else 0.0

    @property
    def lost(self) -> float:
        """Return the time of the plan's choice over the best."""
        return self.measured[self.auto] / self.measured[self.best]


def markdown(measured: Results) -> str:
    """Return the whole report."""
    machine, cells = measured["machine"], [Cell.read(r) for r in measured["cells"]]
    names = " | ".join("grid, P / 2 x 2" if s == "grid" else s for s in SCHEDULES)
    lines = [
        "# Every schedule, measured and predicted",
        "",
        f"Measured {measured['date']} on {machine['processor']}, {machine['cores']} cores, Python "
        f"{machine['python']}, NumPy {machine['numpy']}, {machine['blas']}, "
        f"{cells[0].of['mpi']}; one BLAS thread a rank, B = 1, D = {D}, fp32, forward and backward "
        "together. Made by `make bench`; `schedules.json` has every turn.",
        "",
        "A schedule's cell: milliseconds, and the plan's time over them. The plan uses only the "
        "figures measured before each cell. Lost: time of the schedule that the plan chooses over "
        "that of the fastest.",
        "",
        *([SMALL, ""] if measured["quick"] else []),
        f"| link | P | heads | S_Q | S_KV | {names} | fastest | chosen | lost |",
        "|---" * (8 + len(SCHEDULES)) + "|",
    ]
    for cell in cells:
        of = cell.of
        times = " | ".join(
            f"{cell.measured[s] * 1e3:.1f}, {cell.predicted[s] / cell.measured[s]:.2f}"
            if s in cell.measured
            else "-"
            for s in SCHEDULES
        )
        lines.append(
            f"| {rate(of)} | {of['P']} | {of['H']}/{of['H_KV']} | {of['S_Q']:,} | {of['S_KV']:,} "
            f"| {times} | {cell.best} | {cell.auto} | {cell.lost - 1:+.0%} |"
        )
    return "\n".join([*lines, "", *goals(cells, judged=not measured["quick"]), ""])


def goals(cells: list[Cell], *, judged: bool) -> list[str]:
    """Return the goals, and the values reached."""
    lost = [cell.lost for cell in cells]
    ratios = {
        s: [cell.predicted[s] / cell.measured[s] for cell in cells if s in cell.measured]
        for s in SCHEDULES
    }
    every = [ratio for found in ratios.values() for ratio in found]
    within = sum(x <= WORST for x in lost)
    worst = f"auto within {WORST - 1:.0%} of the fastest: {within} of {len(lost)} cells, worst"
    far, furthest = median(factor(x) for x in every), max(factor(x) for x in every)
    near = sum(factor(x) <= FURTHEST for x in every)
    beyond = f"factor of at most {FURTHEST}: {near} of {len(every)} times, worst"
    leads = [cell for cell in cells if cell.lead_of_grid >= WINS]
    wins = sum(cell.best == "grid" for cell in leads)
    grid = f"the grid is fastest where the plan gives it a lead of {WINS}: of {len(leads)} cells"
    found = [
        Goal(worst, max(lost) - 1, within == len(lost), "+.0%"),
        Goal(f"predicted over measured within a factor of {PREDICTED} in the median", far,
             far <= PREDICTED, ".2f"),
        Goal(beyond, furthest, furthest <= FURTHEST, ".2f"),
        Goal(grid, wins, wins == len(leads), "d"),
    ]  # fmt: skip
    return [
        *(goal.line(judged=judged) for goal in found),
        "- by schedule, median factor (and of its direction): "
        + ", ".join(
            f"{s} {median(factor(x) for x in of):.2f} ({median(of):.2f})"
            for s, of in ratios.items()
            if of
        ),
    ]


def factor(ratio: float) -> float:
    """Return a ratio's factor from 1, in either direction."""
    return max(ratio, 1 / ratio)


def draw(measured: Results) -> "Figure":
    """Draw the fastest schedule of every cell, and the loss where the plan chose another."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells = [Cell.read(r) for r in measured["cells"]]
    sweeps: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        of = cell.of
        if (of["H"], of["H_KV"]) not in HEADS:
            continue  # the slow links, which are in the table only
        key = rate(of), of["P"], of["H"], of["H_KV"]
        sweeps.setdefault(key, []).append(cell)
    links = list(dict.fromkeys(key[0] for key in sweeps))
    others = list(dict.fromkeys(key[1:] for key in sweeps))
    figure = Figure(figsize=(11, 3 * len(links) + 0.8), facecolor="white", layout="constrained")
    panels = figure.subplots(len(links), len(others), squeeze=False, sharex=True, sharey=True)
    for row, link in zip(panels, links, strict=True):
        for axes, other in zip(row, others, strict=True):
            if (link, *other) not in sweeps:
                axes.axis("off")
                continue
            _panel(axes, sweeps[link, *other])
            axes.set_title(f"{link}, P = {other[0]}, heads {other[1]}/{other[2]}", size=10)
        row[0].set_ylabel("S_KV, keys")
    for axes in panels[-1]:
        axes.set_xlabel("S_Q, queries")
    figure.legend(
        handles=[
            Patch(color=c, label=s) for s, c in zip(SCHEDULES, COLOURS, strict=False)
        ],
        loc="outside lower center", ncols=len(SCHEDULES), frameon=False,
    )  # fmt: skip
    figure.suptitle(
        "The fastest schedule, and its lead over the second; below, what auto loses with another"
    )
    return figure


def _panel(axes: "Axes", cells: list[Cell]) -> None:
    """Draw one sweep."""
    s_q, s_kv = (sorted({cell.of[name] for cell in cells}) for name in ("S_Q", "S_KV"))
    for cell in cells:
        x, y = s_q.index(cell.of["S_Q"]), s_kv.index(cell.of["S_KV"])
        first, second = sorted(cell.measured.values())[:2]
        colour = COLOURS[SCHEDULES.index(cell.best)]
        # Pale where the lead is small.
        strength = min(1.0, 0.25 + 1.5 * (second / first - 1))
        axes.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, color=colour, alpha=strength, lw=0)
        text = f"{second / first:.2f}"
        if cell.auto != cell.best:
            text += f"\n{cell.lost - 1:+.0%}"
        axes.text(x, y, text, ha="center", va="center", size=9, color=INK)
    axes.set(xlim=(-0.5, len(s_q) - 0.5), ylim=(-0.5, len(s_kv) - 0.5))
    axes.set_xticks(range(len(s_q)), [f"{n:,}" for n in s_q])
    axes.set_yticks(range(len(s_kv)), [f"{n // 1024}k" for n in s_kv])


def main() -> None:
    """Measure, print, store, draw."""
    parser = parser_for(__doc__, "few small cells, half a minute", "store", "plot")
    parser.add_argument("--again", metavar="FILE", type=Path, help="results of --store")
    options = parser.parse_args()
    if options.again:
        measured = {"quick": False, **json.loads(options.again.read_text())}
    else:
        with exit_without_lab("schedules"):
            measured = {**describe_run(options.quick), "cells": measure(options.quick)}
    print(file=sys.stderr)
    publish("schedules", measured, markdown(measured), options, draw)


if __name__ == "__main__":
    main()
