"""Error against P: why partial results travel in fp32.

    python benchmarks/precision.py [--quick] [--store DIR] [--plot FILE]

On virtual ranks, which compute in fp64, what travels as a partial result is rounded to fp32, fp16
or bf16, and nothing else is (`rounded_wire.py`).  Prints a table in Markdown; `--store` writes it,
and every error as JSON, to DIR; `--plot` draws it.
"""

from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
from bench import Results, describe_run, parser_for, publish
from rounded_wire import Problem, errors, rounded

from lvxattn.draw.rotation import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES = {"B": 4, "H": 2, "S_Q": 256, "S_KV": 4096, "D": 32}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
SCHEDULES = ("lv-xattn", "gather")
# What travels, by name: dtype of out (or dq), and of lse.
WIRES = {
    "fp32": ("float32", "float32"),
    "fp16": ("float16", "float16"),
    "bf16, lse in fp32": ("bfloat16", "float32"),
    "bf16": ("bfloat16", "bfloat16"),
}
ONCE = "for comparison: to round the result once, at the end, to bf16"
COLOUR_OF = dict(zip(WIRES, (COLOURS[0], COLOURS[2], COLOURS[1], COLOURS[5]), strict=True))


def measure(quick: bool) -> Results:
    """Return all errors, with what they were measured on."""
    sizes = {**SIZES, "S_Q": 64, "S_KV": 512} if quick else SIZES
    ranks = RANKS[:5] if quick else RANKS
    problem = Problem.random(**sizes)
    once = {
        name: {dtype: errors(rounded(truth, dtype), truth) for dtype in ("float16", "bfloat16")}
        for name, truth in (("out", problem.out), ("dq", problem.dq))
    }
    rows = [
        row
        for P in ranks
        for schedule in SCHEDULES
        for wire, dtypes in WIRES.items()
        for row in rows_of(problem, P, schedule, wire, dtypes)
    ]
    return {
        **describe_run(quick), "sizes": sizes,
        "ranks": ranks, "once": once, "rows": rows, "growth": growth(rows),
    }  # fmt: skip


def rows_of(
    problem: Problem, P: int, schedule: str, wire: str, dtypes: tuple[str, str]
) -> list[Results]:
    """Return the errors of out and, where it is not the same for all lse, of dq."""
    at = {"P": P, "schedule": schedule, "wire": wire}
    out, lse = problem.forward(P, schedule, dtypes)
    off = np.sqrt(((lse - problem.lse) ** 2).mean(axis=(1, 2)))
    row = {"of": "out", **at, "errors": errors(out, problem.out), "lse": off.tolist()}
    row["in bf16"] = errors(rounded(out, "bfloat16"), problem.out)
    if len(set(dtypes)) > 1:
        return [row]
    dq = problem.backward(P, schedule, dtypes[:1])
    back = {"of": "dq", **at, "errors": errors(dq, problem.dq)}
    return [row, {**back, "in bf16": errors(rounded(dq, "bfloat16"), problem.dq)}]


def growth(rows: list[Results]) -> list[Results]:
    """Return x of error = c (P - 1)^x, P - 1 being the hops, by least squares on logarithms."""
    found = []
    for key in dict.fromkeys((row["of"], row["schedule"], row["wire"]) for row in rows):
        P, error = zip(*line(rows, *key), strict=True)
        x, _ = np.polyfit(np.log(np.array(P) - 1), np.log(error), 1)
        found.append({"of": key[0], "schedule": key[1], "wire": key[2], "exponent": float(x)})
    return found


def line(rows: list[Results], of: str, schedule: str, wire: str) -> list[tuple[int, float]]:
    """Return (P, mean error) where anything travels."""
    return [
        (row["P"], mean(row["errors"]))
        for row in rows
        if (row["of"], row["schedule"], row["wire"]) == (of, schedule, wire) and row["P"] > 1
    ]


def markdown(measured: Results) -> str:
    """Return the report."""
    sizes = ", ".join(f"{name} = {n:,}" for name, n in measured["sizes"].items())
    lines = [
        "# Error against P: why partial results travel in fp32",
        "",
        f"Measured {measured['date']} on virtual ranks that compute in fp64: only partial results "
        f"are rounded, whenever they travel. {sizes}; normally distributed arguments that fp16 and "
        "bf16 hold exactly; the mean over the batch, every index of which is a problem of its own. "
        "Error: root mean square over elements, relative to that of the fp64 result of unsharded "
        "attention. Growth: x of error = c (P - 1)^x, by least squares on logarithms. Predicted: "
        "one rounding times sqrt((P - 1) / 2) in a ring, sqrt((P - 1) / P) gathered. Made by "
        "`python benchmarks/precision.py --store benchmarks/results`; `precision.json` has every "
        "error.",
    ]
    for of, title in (("out", "Forward, out"), ("dq", "Backward, dq")):
        for schedule in SCHEDULES:
            lines += ["", f"## {title}, {schedule}", "", *table(measured, of, schedule)]
    lines += ["", "## As they are returned in half precision", "", *returned(measured)]
    return "\n".join(lines) + "\n"


def table(measured: Results, of: str, schedule: str) -> list[str]:
    """Render what travelling alone costs."""
    cells = {
        (row["wire"], row["P"]): mean(row["errors"])
        for row in measured["rows"]
        if (row["of"], row["schedule"]) == (of, schedule)
    }
    wires = [wire for wire in WIRES if (wire, 1) in cells]
    once = mean(measured["once"][of]["bfloat16"])
    lines = [
        f"| P | {' | '.join(wires)} | predicted, {'bf16' if of == 'dq' else 'bf16, lse in fp32'} |",
        "|---" * (len(wires) + 2) + "|",
    ]
    for P in measured["ranks"]:
        fair = once * ((P - 1) / (2 if schedule == "lv-xattn" else P)) ** 0.5
        numbers = " | ".join(f"{cells[wire, P]:.2g}" for wire in wires)
        lines.append(f"| {P} | {numbers} | {fair:.2g} |")
    x = {g["wire"]: g["exponent"] for g in measured["growth"]
         if (g["of"], g["schedule"]) == (of, schedule)}  # fmt: skip
    return [*lines, f"| growth | {' | '.join(f'{x[wire]:.2f}' for wire in wires)} | |"]


def returned(measured: Results) -> list[str]:
    """Render out and dq after their last rounding, that of the result to bf16."""
    columns = [("out", wire) for wire in WIRES if wire != "fp16"] + [("dq", "fp32"), ("dq", "bf16")]
    lines = [
        "lv-xattn, out and dq rounded to bf16 at the end. That rounding alone: "
        + ", ".join(
            f"{mean(measured['once'][of]['bfloat16']):.2g} for {of}" for of in ("out", "dq")
        )
        + ".",
        "",
        f"| P | {' | '.join(f'{of}, {wire}' for of, wire in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for P in measured["ranks"]:
        cells = {
            (row["of"], row["wire"]): mean(row["in bf16"])
            for row in measured["rows"]
            if (row["P"], row["schedule"]) == (P, "lv-xattn")
        }
        lines.append(f"| {P} | {' | '.join(f'{cells[key]:.2g}' for key in columns)} |")
    return lines


def draw(measured: Results) -> "Figure":
    """Draw error over P: passes below one another, schedules side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), facecolor="white", layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for of, row in zip(("out", "dq"), panels, strict=True):
        for schedule, axes in zip(SCHEDULES, row, strict=True):
            _panel(axes, measured, of, schedule)
    panels[0, 0].set_title("lv-xattn: rounded at every hop of a ring", size=13, color=INK)
    panels[0, 1].set_title("gather: rounded once, merged at home", size=13, color=INK)
    for axes, name in zip(panels[:, 0], ("out, forward", "dq, backward"), strict=True):
        axes.set_ylabel(f"relative error of {name}", size=13, color=INK)
    for axes in panels[1]:
        axes.set_xlabel("P, ranks", size=13, color=INK)
    figure.legend(
        handles=panels[0, 0].get_legend_handles_labels()[0],
        loc="outside lower center", frameon=False, fontsize=12, labelcolor=INK,
    )  # fmt: skip
    return figure


def _panel(axes: "Axes", measured: Results, of: str, schedule: str) -> None:
    """Draw one pass under one schedule; every line is named at its end."""
    ranks = measured["ranks"][1:]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlim=(ranks[0] / 1.3, ranks[-1] * 15), ylim=(6e-9, 1.5))
    axes.set_xticks(ranks, [str(P) for P in ranks])
    axes.minorticks_off()
    axes.tick_params(labelsize=12, colors=INK)
    axes.grid(color="#dddddd", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    once = mean(measured["once"][of]["bfloat16"])
    style = {"color": INK, "lw": 1.2, "ls": (0, (4, 3)), "zorder": 3}
    axes.plot([ranks[0], ranks[-1]], [once, once], **style, label=ONCE)
    said = []
    for g in measured["growth"]:
        if (g["of"], g["schedule"]) == (of, schedule):
            P, error = zip(*line(measured["rows"], of, schedule, g["wire"]), strict=True)
            colour = COLOUR_OF[g["wire"]]
            axes.plot(P, error, color=colour, lw=2.2, marker="o", ms=5)
            said.append((error[-1], g["wire"], colour))
    lowest = -np.inf
    for height, text, colour in sorted(said):
        lowest = max(np.log10(height), lowest + 0.45)
        axes.text(ranks[-1] * 1.25, 10**lowest, text, color=colour, size=11.5, va="center")


def main() -> None:
    """Measure, print, store, draw."""
    parser = parser_for(__doc__, "up to 16 ranks, 3 seconds", "store", "plot")
    options = parser.parse_args()
    measured = measure(options.quick)
    publish("precision", measured, markdown(measured), options, draw)


if __name__ == "__main__":
    main()
