"""The report of a run: a table for people, a JSON document for programs."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

from lvxattn.cli.run_check import Check
from lvxattn.cli.run_problem import Problem
from lvxattn.common.handshake import AUTO
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Meter
from lvxattn.common.new_file import write_file
from lvxattn.draw.bars import format_bytes
from lvxattn.plan.choose import Candidate, candidates, explain, named
from lvxattn.plan.trace import Overlap, Trace

# Widths of the columns where stdout is no terminal, regardless of their contents.
_WIDTHS = {"host": 14, "device": 16}

Report = dict[str, Any]


class Cost(NamedTuple):
    """The cost of one repetition on one rank.

    Attributes
    ----------
    forward, backward : float
        Seconds since all ranks started it together.
    meter : Meter
        Of both passes.
    """

    forward: float
    backward: float
    meter: Meter


def report_of(
    options: Namespace,
    problem: Problem,
    layout: Layout,
    by_rank: list[tuple[dict[str, Any], list[Cost]]],
    checks: list[Check],
    trace: Trace | None,
) -> Report:
    """Return the report as it is written as JSON.

    Seconds are medians over repetitions; those of `measured` are the slowest rank's.  ``why``,
    ``machine`` and ``explained``, which justify the choice of the schedule, are empty where the
    schedule was given; ``grid`` is None but for a grid.

    Parameters
    ----------
    options : argparse.Namespace
    problem : Problem
    layout : Layout
    by_rank : list of (dict, list of Cost)
        By rank, entries of the report, and the costs of its repetitions.
    checks : list of Check
    trace : Trace, optional
        Of the last repetition.
    """
    ranks = [facts | _medians(costs) for facts, costs in by_rank]
    repetitions = list(zip(*(costs for _, costs in by_rank), strict=True))
    measured = {
        name: [max(getattr(cost, name) for cost in costs) for costs in repetitions]
        for name in ("forward", "backward")
    }
    totals: dict[str, Any] = {
        name: sum(rank[name] for rank in ranks)
        for name in ("queries", "keys", "computing", "waiting", "messages", "bytes")
    }
    if trace is not None:
        for rank, overlap in zip(ranks, trace.overlap(), strict=True):
            rank |= overlap._asdict()
        totals |= {name: sum(rank[name] for rank in ranks) for name in Overlap._fields}
    totals |= {name: median(seconds) for name, seconds in measured.items()}
    totals |= {"ranks": len(ranks), "hosts": len({rank["host"] for rank in ranks})}
    found = candidates(layout, layout.machine) if options.schedule == AUTO else []
    return {
        "title": problem.title,
        "shapes": problem.shapes,
        "dtype": problem.dtype,
        "accumulator": layout.accumulator,
        "schedule": layout.schedule,
        "grid": layout.grid,
        "why": _why(layout, found) if found else "",
        "machine": _machine(layout, problem) if found else "",
        "explained": explain(layout) if found else "",
        "scale": layout.scale,
        "repeats": options.repeat,
        "measured": measured,
        "ranks": ranks,
        "totals": totals,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
    }


def print_problem(problem: Problem, memory: str) -> None:
    """Print what is to be computed, and the memory for it.

    Parameters
    ----------
    problem : Problem
    memory : str
        What a rank will need, and what is free.
    """
    q, k, v = (problem.shapes[name] for name in "qkv")
    print(
        f"""
LV-XAttn run
  problem   {problem.title}
  shapes    q {q}   k {k}   v {v}   {problem.dtype}
  memory    at least {memory}""",
        flush=True,
    )


def print_report(report: Report, *, launched: bool) -> None:
    """Print the table, at most 100 columns wide where stdout is no terminal.

    Parameters
    ----------
    report : Report
    launched : bool
        Whether a launcher started this process: some give every rank a terminal, wherever its
        output goes in the end.
    """
    totals, repeats = report["totals"], report["repeats"]
    P = totals["ranks"]
    often = f"median of {repeats} after a warm-up" if repeats else "once"
    passes = "forward and backward" if totals["backward"] else "forward"
    ranks = f"{P} rank{'s' * (P > 1)}"
    schedule = named(report["schedule"], report["grid"])
    print(f"  schedule  {schedule} on {ranks}, {passes}, {often}")
    if report["why"]:
        print(f"  chosen    {report['why']}")
    if report["machine"]:
        print(f"  measured  {report['machine']}")
    for kernel in dict.fromkeys(rank["kernel"] for rank in report["ranks"] if rank["kernel"]):
        those = [str(rank["rank"]) for rank in report["ranks"] if rank["kernel"] == kernel]
        whose = "" if len(those) == len(report["ranks"]) else f" (on ranks {', '.join(those)})"
        print(f"  kernel    {kernel}{whose}")
    print()
    _print_table(report, fixed=launched or not sys.stdout.isatty())
    if "hidden" in totals:
        _print_overlap(report)
    for name in ("forward", "backward"):
        if totals[name]:
            print(f"  {name:<9}{totals[name]:>10.4f} s on the slowest rank")
    if report["checks"]:
        _print_checks(report["checks"])


def write_json(report: Report, path: str) -> None:
    """Write everything to a file, or to stdout if path is ``"-"``."""
    text = json.dumps(report, indent=2)
    if path == "-":
        print(text, flush=True)
    else:
        write_file(path, text + "\n")


def _machine(layout: Layout, problem: Problem) -> str:
    """Return how the machine was measured, and how this problem differs."""
    machine, P = layout.machine, layout.size
    if machine is None or machine.measured is None:
        return ""
    q, k = problem.shapes["q"], problem.shapes["k"]
    told = machine.measured.compared_with("this", (q[1], k[1], q[3]), problem.dtype)
    return told if machine.ranks == P else f"{told}; it had {machine.ranks} ranks, not {P}"


def _why(layout: Layout, found: list[Candidate]) -> str:
    """Return why the layout's schedule is the best one, compared with the next."""
    best, *others = [c for c in found if not c.refused]
    # The ends of the grid are other schedules.
    other = next(c for c in others if c.grid is None or 1 not in c.grid)
    if layout.machine is None:
        told, costs = "fewest bytes", [format_bytes(c.nbytes) for c in (best, other)]
    else:
        told = f"least time on {layout.machine.name}"
        costs = [f"{c.seconds:.2e} s" for c in (best, other)]
    name = named(other.schedule, other.grid)
    return f"{told}, forward and backward: {costs[0]}; {name}: {costs[1]}"


def _medians(costs: list[Cost]) -> dict[str, Any]:
    """Return one rank's costs over all repetitions."""
    meters = [cost.meter for cost in costs]
    return {
        "forward": median(cost.forward for cost in costs),
        "backward": median(cost.backward for cost in costs),
        "computing": median(meter.computing for meter in meters),
        "waiting": median(meter.waiting for meter in meters),
        "messages": meters[0].messages,
        "bytes": meters[0].bytes,
    }


def _print_table(report: Report, *, fixed: bool) -> None:
    def costs(row: dict[str, Any]) -> tuple[str, ...]:
        seconds = _seconds(row["computing"]), _seconds(row["waiting"])
        return *seconds, f"{row['messages']:,}", format_bytes(row["bytes"])

    cells: list[tuple[str, ...]] = [
        ("rank", "host", "device", "share of keys", "computing", "waiting", "messages", "sent")
    ]
    for rank in report["ranks"]:
        share = f"{100 * rank['share']:.1f} %"
        cells.append((f"{rank['rank']}", rank["host"], rank["device"], share, *costs(rank)))
    cells.append(("all", "", "", f"{report['totals']['keys']:,}", *costs(report["totals"])))

    widths = [5, _WIDTHS["host"], _WIDTHS["device"], 13, 10, 10, 8, 8]
    if not fixed:
        widths = [max(len(row[n]) for row in cells) for n in range(len(widths))]
    for row in cells:
        line = ""
        for n, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text = cell if len(cell) <= width else cell[: width - 1] + "…"
            line += "  " + (f"{text:<{width}}" if n in (1, 2) else f"{text:>{width}}")
        print(line.rstrip())
    print()


def _print_overlap(report: Report) -> None:
    if report["repeats"] and report["repeats"] > 1:
        last = f"the last of {report['repeats']} repetitions"
        print(f"  Above, seconds are medians; below is {last} alone, which the trace shows.\n")
    print("   rank  on the way   hidden behind computing   exposed")
    for rank in (*report["ranks"], report["totals"] | {"rank": "all"}):
        on_the_way, hidden, exposed = (rank[name] for name in Overlap._fields)
        line = f"  {rank['rank']:>5}{_seconds(on_the_way):>12}"
        for number, width in ((hidden, 16), (exposed, 12)):
            line += f"{_seconds(number):>{width}}{100 * number / (on_the_way or 1):>6.1f} %"
        print(line)
    print()


def _print_checks(checks: list[dict[str, Any]]) -> None:
    print("\n  check  rows       error     allowed   against a softmax in float64 over all ranks")
    for check in checks:
        verdict = "ok" if check["passed"] else "FAIL"
        numbers = f"{check['error']:>12.3g}{check['allowed']:>12.3g}"
        print(f"  {check['name']:<5}{check['rows']:>6}{numbers}   {verdict}")
    print("\n  all checks passed" if all(c["passed"] for c in checks) else "\n  a check FAILED")


def _seconds(number: float) -> str:
    return f"{number:.4f} s"
