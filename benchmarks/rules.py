"""What a rule costs in time, and saves in bytes, against the share of the scores that it shows.

    python benchmarks/rules.py [--quick] [--store DIR]

For each implementation and rule, the processor time of a block's forward, and of forward and
backward, as a ratio to the same block without a mask times the visible share: 1 is a rule that
costs exactly what it shows.  Times are medians of rounds in turns, of one thread's clock, so that
other programs disturb them little.  Bytes are those of the plan, which the tests hold against what
ranks send: of four ranks, forward and backward.

Prints tables in Markdown; `--store` writes them, and every turn as JSON, to DIR.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from bench import Results, describe_run, parser_for, publish

from lvxattn import mpi_impl, reference, torch_impl
from lvxattn.common.rules import Rule
from lvxattn.common.segments import Causal, Segments
from lvxattn.plan import messages, planned

H, D, SCALE, P = 4, 64, 0.125, 4
TEXTS = (117, 185, 43, 65, 148, 129, 56, 132)
IMAGES = (1732, 2204, 1089, 2671, 1500, 2950, 1333, 2101)
IMPLEMENTATIONS = (reference, mpi_impl, torch_impl)


def rules_of(quick: bool) -> dict[str, tuple[Rule, int, int]]:
    """Return the rules, each with the numbers of queries and of keys of a block."""
    texts, images = (tuple(n // 20 for n in of) if quick else of for of in (TEXTS, IMAGES))
    squares = (64,) if quick else (2048, 8192)
    return {
        "8 documents, each text sees its image": (
            Segments(texts, images), sum(texts), sum(images),
        ),
        "each text sees all images before it": (
            Segments(texts, images, earlier=True), sum(texts), sum(images),
        ),
        **{f"causal, {n:,} by {n:,}": (Causal(), n, n) for n in squares},
    }  # fmt: skip


def passes(implementation: Any, S_Q: int, S_KV: int) -> Callable[[Rule | None, bool], None]:
    """Return a function that runs a block's forward, and its backward if asked to."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, H, s, D)) for s in (S_Q, S_KV, S_KV, S_Q)]
    if implementation is not reference:
        arrays = [x.astype(np.float32) for x in arrays]
    if implementation is torch_impl:
        arrays = [torch.from_numpy(x) for x in arrays]
    q, k, v, dout = arrays

    def run(rule: Rule | None, backward: bool) -> None:
        out, lse = implementation.block_attention(q, k, v, scale=SCALE, mask=rule)
        if backward:
            zeros = [x * 0 for x in (k, v)]
            delta = (dout * out).sum(-1)
            implementation.block_attention_backward(
                dout, q, k, v, lse, delta, *zeros, scale=SCALE, mask=rule
            )

    return run


def measure_rule(implementation: Any, rule: Rule, S_Q: int, S_KV: int, rounds: int) -> Results:
    """Return the visible share, and seconds without the rule and with it, by pass."""
    run = passes(implementation, S_Q, S_KV)
    shown = rule(0, 0, np.arange(S_Q)[:, None], np.arange(S_KV))
    found: Results = {"visible": float(np.mean(shown))}
    for name, backward in (("forward", False), ("with backward", True)):
        taken: dict[Rule | None, list[float]] = {None: [], rule: []}
        for _ in range(rounds):
            for given, seconds in taken.items():
                start = time.process_time()
                run(given, backward)
                seconds.append(time.process_time() - start)
        found[name] = list(taken.values())
    return found


def sent(rule: Rule, S_Q: int, S_KV: int, schedule: str) -> list[int]:
    """Return the bytes of all ranks, forward and backward: with the rule, and without."""
    layout = planned((1, H, S_Q, D), (1, H, S_KV, D), P, dtype="float32", schedule=schedule)
    return [
        sum(
            message.nbytes
            for rank in range(P)
            for backward in (False, True)
            for message in messages(of, rank, backward=backward)
        )
        for of in (replace(layout, structures=(rule,) * P, rules=(True,) * P), layout)
    ]


def ratio(found: Results, name: str) -> float:
    """Return the time with a rule, over that of what it shows."""
    whole, part = map(median, found[name])
    return float(part / (whole * found["visible"]))


def markdown(measured: Results) -> str:
    """Return the report."""
    machine = measured["machine"]
    lines = [
        "# What rules cost",
        "",
        f"Measured {measured['date']} on {machine['processor']}, {machine['cores']} cores, load "
        f"{measured['load'][0]:.1f} to {measured['load'][1]:.1f}, Python {machine['python']}, "
        f"NumPy {machine['numpy']}, {machine['blas']}, PyTorch {measured['torch']}; one thread, "
        f"B = 1, {H} heads of {D}, fp32 (the reference: fp64). Made by `python "
        "benchmarks/rules.py --store benchmarks/results`; `rules.json` has every turn.",
        "",
        "Processor time, over that of the same block without a mask times the visible share:",
        "",
        "| implementation | rule | visible | forward | with backward |",
        "|---|---|--:|--:|--:|",
    ]
    for key, found in measured["cost"].items():
        implementation, rule = key.split(": ")
        ratios = " | ".join(f"{ratio(found, name):.2f}" for name in ("forward", "with backward"))
        lines.append(f"| {implementation} | {rule} | {found['visible']:.0%} | {ratios} |")
    lines += ["", f"Bytes that {P} ranks send, forward and backward:", ""]
    lines += ["| rule | schedule | with it | without | share |", "|---|---|--:|--:|--:|"]
    for key, (with_it, without) in measured["bytes"].items():
        rule, schedule = key.split(": ")
        share = with_it / without
        lines.append(f"| {rule} | {schedule} | {with_it:,} | {without:,} | {share:.0%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, store."""
    options = parser_for(__doc__, "small blocks, one round", "store").parse_args()
    torch.set_num_threads(1)
    load, rules = os.getloadavg()[0], rules_of(options.quick)
    measured = {
        **describe_run(options.quick),
        "torch": torch.__version__,
        "cost": {
            f"{implementation.__name__.rpartition('.')[2]}: {name}": measure_rule(
                implementation, *rule, rounds=1 if options.quick else 3
            )
            for implementation in IMPLEMENTATIONS
            for name, rule in rules.items()
        },
        "bytes": {
            f"{name}: {schedule}": sent(*rule, schedule)
            for name, rule in rules.items()
            for schedule in ("lv-xattn", "ring")
        },
    }
    measured["load"] = [load, os.getloadavg()[0]]
    publish("rules", measured, markdown(measured), options)


if __name__ == "__main__":
    main()
