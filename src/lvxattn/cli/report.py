"""What a run says: one table for people, one JSON document for programs."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from lvxattn.cli.check import Check
from lvxattn.cli.problem import Problem
from lvxattn.common.handshake import AUTO
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Meter
from lvxattn.plan.choose import Candidate, candidates, explain
from lvxattn.plan.trace import Overlap, Trace

# Where stdout is no terminal, a column has this width whatever is in it.
_WIDTHS = {"host": 14, "device": 16}


@dataclass(frozen=True)
class Cost:
    """What one measurement took on one rank.

    Attributes
    ----------
    queries, keys : int
        This rank's.
    forward, backward : float
        Seconds, from a start that all ranks made together.
    meter : Meter
        Of both.
    host, device, kernel : str
        `kernel` is empty where there is but one.
    threads : int
        Of its arithmetic on the host.
    """

    queries: int
    keys: int
    forward: float
    backward: float
    meter: Meter
    host: str = ""
    device: str = ""
    kernel: str = ""
    threads: int = 0


@dataclass(frozen=True)
class Report:
    """All that there is to say; seconds are medians of `measured`, those of the slowest rank.

    `why` says why the schedule was chosen, in one line, `machine` what that rests on, if it was
    measured, and `explained` all of it, in a table; they are empty where the schedule was given.
    """

    title: str
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    accumulator: str
    schedule: str
    why: str
    machine: str
    explained: str
    scale: float
    repeats: int | None
    measured: dict[str, list[float]]
    ranks: list[dict[str, Any]]
    totals: dict[str, Any]
    checks: list[dict[str, Any]]

    @staticmethod
    def of(
        options: Namespace,
        problem: Problem,
        layout: Layout,
        costs: list[list[Cost]],
        checks: list[Check],
        trace: Trace | None = None,
    ) -> "Report":
        """Sum up what was measured: `costs` by rank and repetition, `trace` of the last one."""
        ranks = [_rank(number, repeated, layout) for number, repeated in enumerate(costs)]
        measured = {
            name: [
                max(getattr(cost, name) for cost in at_once) for at_once in zip(*costs, strict=True)
            ]
            for name in ("forward", "backward")
        }
        times = {name: median(seconds) for name, seconds in measured.items()}
        totals: dict[str, Any] = {
            name: sum(rank[name] for rank in ranks)
            for name in ("queries", "keys", "computing", "waiting", "messages", "bytes")
        }
        if trace is not None:
            for rank, overlap in zip(ranks, trace.overlap(), strict=True):
                rank |= overlap._asdict()
            totals |= {name: sum(rank[name] for rank in ranks) for name in Overlap._fields}
        found = candidates(layout, layout.machine) if options.schedule == AUTO else []
        return Report(
            problem.title,
            problem.shapes,
            problem.dtype,
            layout.accumulator,
            layout.schedule,
            _why(layout, found) if found else "",
            _machine(layout, problem) if found else "",
            explain(layout) if found else "",
            layout.scale,
            options.repeat,
            measured,
            ranks,
            totals | times | {"ranks": len(ranks), "hosts": len({r["host"] for r in ranks})},
            [asdict(check) | {"passed": check.passed} for check in checks],
        )


def print_report(report: Report, *, launched: bool) -> None:
    """Print the table, at most 100 columns wide where stdout is no terminal.

    Parameters
    ----------
    report : Report
    launched : bool
        By a launcher; some give every rank a terminal, wherever its output goes in the end.
    """
    q, k, v = (report.shapes[name] for name in "qkv")
    ranks = report.totals["ranks"]
    often = f"median of {report.repeats} after a warm-up" if report.repeats else "once"
    passes = "forward and backward" if report.totals["backward"] else "forward"
    print(f"""
LV-XAttn run
  problem   {report.title}
  shapes    q {q}   k {k}   v {v}   {report.dtype}
  schedule  {report.schedule} on {ranks} rank{"s" * (ranks > 1)}, {passes}, {often}""")
    if report.why:
        print(f"  chosen    {report.why}")
    if report.machine:
        print(f"  measured  {report.machine}")
    for kernel in dict.fromkeys(rank["kernel"] for rank in report.ranks if rank["kernel"]):
        those = [str(rank["rank"]) for rank in report.ranks if rank["kernel"] == kernel]
        whose = "" if len(those) == len(report.ranks) else f" (on ranks {', '.join(those)})"
        print(f"  kernel    {kernel}{whose}")
    print()
    _print_table(report, fixed=launched or not sys.stdout.isatty())
    if "hidden" in report.totals:
        _print_overlap(report)
    times = {name: report.totals[name] for name in ("forward", "backward")}
    for name, seconds in times.items():
        if seconds:
            print(f"  {name:<9}{seconds:>10.4f} s on the slowest rank")
    if report.checks:
        _print_checks(report.checks)


def write_json(report: Report, path: str) -> None:
    """Write everything to a file, or to stdout if path is ``"-"``."""
    text = json.dumps(asdict(report), indent=2)
    if path == "-":
        print(text, flush=True)
    else:
        with open(path, "w") as file:
            file.write(text + "\n")


def _machine(layout: Layout, problem: Problem) -> str:
    """Say what the machine was measured with, and how this problem differs."""
    machine, P = layout.machine, layout.size
    if machine is None or machine.measured is None:
        return ""
    q, k = problem.shapes["q"], problem.shapes["k"]
    told = machine.measured.beside("this", (q[1], k[1], q[3]), problem.dtype)
    return told if machine.ranks == P else f"{told}; it had {machine.ranks} ranks, not {P}"


def _why(layout: Layout, found: list[Candidate]) -> str:
    """Say by what the layout's schedule is the best one, and what would be next."""
    best, other = [c for c in found if not c.refused][:2]
    if layout.machine is None:
        told, costs = "fewest bytes", [f"{_bytes(c.nbytes)}" for c in (best, other)]
    else:
        told = f"least time on {layout.machine.name}"
        costs = [f"{c.seconds:.2e} s" for c in (best, other)]
    return f"{told}, forward and backward: {costs[0]}; {other.schedule}: {costs[1]}"


def _rank(number: int, costs: list[Cost], layout: Layout) -> dict[str, Any]:
    first = costs[0]
    return {
        "rank": number,
        "host": first.host,
        "device": first.device,
        "kernel": first.kernel,
        "threads": first.threads,
        "queries": first.queries,
        "keys": first.keys,
        "share": first.keys / max(1, layout.S_KV),
        "forward": median(cost.forward for cost in costs),
        "backward": median(cost.backward for cost in costs),
        "computing": median(cost.meter.computing for cost in costs),
        "waiting": median(cost.meter.waiting for cost in costs),
        "messages": first.meter.messages,
        "bytes": first.meter.bytes,
    }


def _print_table(report: Report, *, fixed: bool) -> None:
    cells = [
        ("rank", "host", "device", "share of keys", "computing", "waiting", "messages", "sent")
    ]
    for rank in report.ranks:
        share = f"{100 * rank['share']:.1f} %"
        costs = _seconds(rank["computing"]), _seconds(rank["waiting"]), f"{rank['messages']:,}"
        sent = _bytes(rank["bytes"])
        cells.append((f"{rank['rank']}", rank["host"], rank["device"], share, *costs, sent))
    totals = report.totals
    costs = _seconds(totals["computing"]), _seconds(totals["waiting"]), f"{totals['messages']:,}"
    cells.append(("all", "", "", f"{totals['keys']:,}", *costs, _bytes(totals["bytes"])))

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
    if report.repeats and report.repeats > 1:
        last = f"the last of {report.repeats} repetitions"
        print(f"  Above, seconds are medians; below is {last} alone, which the trace shows.\n")
    print("   rank  on the way   hidden behind computing   exposed")
    for rank in (*report.ranks, report.totals | {"rank": "all"}):
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


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
