"""What a rule costs, against the share of the scores that it shows.

    python -m benchmarks.rules [--rounds N]

Prints, for each implementation and rule, the CPU time of a block's forward, and of forward and
backward, as a ratio to the same block without a mask times the visible share: 1 is a rule that
costs exactly what it shows.  Times are medians of rounds in turns, of one thread's CPU clock, so
that other programs disturb them little.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lvxattn import mpi_impl, reference, torch_impl
from lvxattn.common.rules import Rule
from lvxattn.common.segments import Causal, Segments

H, D, SCALE = 2, 64, 0.125
TEXTS = (117, 185, 43, 65, 148, 129, 56, 132)
IMAGES = (1732, 2204, 1089, 2671, 1500, 2950, 1333, 2101)
RULES: dict[str, tuple[Rule, int, int]] = {
    "8 documents, each text sees its image": (Segments(TEXTS, IMAGES), sum(TEXTS), sum(IMAGES)),
    "each text sees all images before it": (
        Segments(TEXTS, IMAGES, earlier=True), sum(TEXTS), sum(IMAGES),
    ),
    "causal, 2,048 by 2,048": (Causal(), 2048, 2048),
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


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rules", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    print("| implementation | rule | visible | forward | with backward |\n|---|---|---|---|---|")
    for implementation in (reference, mpi_impl, torch_impl):
        for name, (rule, S_Q, S_KV) in RULES.items():
            mask = rule(0, 0, np.arange(S_Q)[:, None], np.arange(S_KV))
            share = float(np.mean(mask))
            run = passes(implementation, S_Q, S_KV)
            ratios = []
            for backward in (False, True):
                seconds: dict[Rule | None, list[float]] = {None: [], rule: []}
                for _ in range(rounds):
                    for given, taken in seconds.items():
                        start = time.process_time()
                        run(given, backward)
                        taken.append(time.process_time() - start)
                whole, part = (statistics.median(taken) for taken in seconds.values())
                ratios.append(part / (whole * share))
            title = implementation.__name__.rpartition(".")[2]
            print(f"| {title} | {name} | {share:.0%} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
