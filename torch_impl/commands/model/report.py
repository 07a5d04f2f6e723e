"""The table of ``model``, at most 100 columns wide."""

from argparse import Namespace
from dataclasses import asdict
from statistics import median
from typing import Any

from lvxattn.cli.run_report import Report
from lvxattn.common.handshake import SCHEDULES
from lvxattn.draw.bars import format_bytes
from lvxattn.torch_impl.commands.model.check import Check
from lvxattn.torch_impl.commands.model.work import Cost

_COLUMNS = "tower", "text", "cross", "waiting", "backward", "update"


def report_of(
    options: Namespace,
    parameters: int,
    losses: list[float],
    tokens: list[int],
    by_rank: list[tuple[dict[str, Any], list[Cost]]],
    checks: list[Check],
) -> Report:
    """Return the report as it is written as JSON.

    Seconds are medians over steps, without the first one if there are several.

    Parameters
    ----------
    options : argparse.Namespace
    parameters : int
        Of the model.
    losses : list of float
        Of all steps.
    tokens : list of int
        That were generated.
    by_rank : list of (dict, list of Cost)
        By rank, its facts and the costs of its steps.
    checks : list of Check
    """
    ranks = []
    for facts, costs in by_rank:
        steps = [asdict(cost) for cost in (costs[1:] or costs)]
        ranks.append(facts | {name: median(step[name] for step in steps) for name in steps[0]})
    seconds = max(rank["total"] for rank in ranks)
    sharded = options.text == "sharded"
    schedule = (options.schedule or SCHEDULES[0]) if sharded else "replicated"
    return {
        "model": options.model,
        "size": None if options.weights else options.size or "tiny",
        "weights": options.weights,
        "parameters": parameters,
        "dtype": options.dtype,
        "frames": options.frames,
        "text_tokens": options.text_tokens,
        "schedule": schedule,
        "text": options.text,
        "steps": len(by_rank[0][1]),
        "losses": losses,
        "tokens": tokens,
        "ranks": ranks,
        "seconds": seconds,
        "tokens_per_second": (len(tokens) or options.text_tokens) / seconds,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
    }


def print_report(report: Report) -> None:
    """Print the table."""
    ranks, steps = report["ranks"], report["steps"]
    whose = report["weights"] or f"{report['size']}, random weights"
    P = len(ranks)
    if report["tokens"]:
        what = f"{len(report['tokens'])} tokens generated"
    else:
        what = "forward and backward" if steps == 1 else f"median of steps 2 to {steps}"
    print(f"""
LV-XAttn model
  model     {report["model"]}, {whose}: {report["parameters"]:,} parameters in {report["dtype"]}
  input     {report["frames"]:,} frames, {report["text_tokens"]:,} text tokens, {report["text"]}
  schedule  {report["schedule"]} on {P} rank{"s" * (P > 1)}, {what}

  rank     tower      text  cross-att.  backward    update |  waiting      sent  peak memory""")
    for rank in ranks:
        cells = "".join(
            f"{rank[name]:>{width}.3f} s"
            for name, width in (
                ("tower", 8), ("text", 8), ("cross", 10), ("backward", 8), ("update", 8),
            )
        )  # fmt: skip
        sent, memory = format_bytes(rank["bytes"]), format_bytes(rank["peak"])
        print(f"  {rank['rank']:>4}{cells} |{rank['waiting']:>7.3f} s{sent:>10}{memory:>13}")
    each = "in all" if report["tokens"] else "a step"
    print(f"""
  {each:10}{report["seconds"]:.3f} s on the slowest rank, \
{report["tokens_per_second"]:,.1f} tokens a second""")
    if report["losses"]:
        print(f"  loss      {report['losses'][-1]:.6f}")
    if report["checks"]:
        _print_checks(report["checks"])


def _print_checks(checks: list[dict[str, Any]]) -> None:
    print(
        "\n  check            compared       error       limit   against the model on rank 0 alone"
    )
    for check in checks:
        verdict = "ok" if check["passed"] else "FAIL"
        numbers = f"{check['error']:>12.2g}{check['limit']:>12.2g}"
        compared = f"{check['compared']:,} of {check['of']:,}"
        print(f"  {check['name']:9}{compared:>16}{numbers}   {verdict}")
    print("\n  all checks passed" if all(c["passed"] for c in checks) else "\n  a check FAILED")
