"""A compiled step against an eager one: layers of cross-attention, on one rank and on four.

    python benchmarks/compiled.py [--json FILE] [--quick]

Steps (forward and backward) of the same layers, compiled by inductor without a graph break and not
compiled, take turns; the result is the median ratio of such pairs, of times and of processor times,
on which other programs of a busy machine have less influence.  Ranks of this machine, of one thread
each, over gloo; a step begins on all ranks together and ends with the slowest.
"""

import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from activations import Layers
from bench import goal_of, parser_for, take_turns, write_json
from torch import Tensor

GOAL = 1.0
LAYERS, E, H, H_KV = 4, 256, 4, 1
# By ranks: queries and keys of each.  Small ones show what a call costs, large ones arithmetic.
SIZES = {1: [(16, 512), (256, 4096)], 4: [(16, 512), (64, 2048)]}
PAIRS, QUICK_PAIRS = 15, 3


def main() -> None:
    """Print, and on request store, times and their ratios."""
    parser = parser_for(__doc__, f"one rank, small, {QUICK_PAIRS} pairs", "json")
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    pairs = QUICK_PAIRS if options.quick else PAIRS
    for P, sizes in SIZES.items():
        if options.quick and P > 1:
            break
        given = P, sizes[:1] if options.quick else sizes, pairs
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(on_rank, (folder, *given), nprocs=P)
            found = json.loads(Path(folder, "rows").read_text())
        for row in found:
            show(row)
        rows += found
    print(f"goal{goal_of(options.quick)}: compiled at most {GOAL:.2f} of eager")
    stored = {"torch": torch.__version__, "layers": LAYERS, "E": E, "H": H, "H_KV": H_KV}
    write_json(options.json, {**stored, "load": [load, os.getloadavg()[0]], "rows": rows})


def on_rank(rank: int, folder: str, P: int, sizes: list[tuple[int, int]], pairs: int) -> None:
    """Measure on one of P ranks; rank 0 writes the rows to a file.  Collective."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=P)
    rows = [
        compare(S_Q, S_KV, again, pairs) | {"P": P}
        for S_Q, S_KV in sizes
        for again in (True, False)
    ]
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def compare(S_Q: int, S_KV: int, again: bool, pairs: int) -> dict[str, Any]:
    """Return seconds of both, and the median ratios.  Collective.

    Parameters
    ----------
    S_Q, S_KV : int
        Of each rank.
    again : bool
        Whether keys and values are recomputed.
    pairs : int
        Number of turns of both.
    """
    torch.manual_seed(0)
    model = Layers(LAYERS, E, H, num_kv_heads=H_KV, recompute_kv=again)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    x, y = torch.randn(1, S_Q, E, requires_grad=True), torch.randn(1, S_KV, E, requires_grad=True)
    both = (partial(step, run, model, x, y) for run in (compiled, model))
    turns = take_turns(pairs + 2, *both)[2:]  # the first compile, and warm up
    return {
        "S_Q": S_Q, "S_KV": S_KV, "recomputed": again,
        "compiled": median(a for (a, _), _ in turns), "eager": median(b for _, (b, _) in turns),
        "ratio": median(a / b for (a, _), (b, _) in turns),
        "processor": median(a / b for (_, a), (_, b) in turns),
    }  # fmt: skip


def step(run: Any, model: Layers, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the seconds of a forward and a backward on the slowest rank, and of all processors.

    Collective.
    """
    dist.barrier()
    start, before = perf_counter(), process_time()
    out = run(x, y)
    torch.autograd.grad(out, [x, y, *model.parameters()], torch.ones_like(out))
    slowest = torch.tensor(perf_counter() - start, dtype=torch.float64)
    together = torch.tensor(process_time() - before, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(together)
    return float(slowest), float(together)


def show(row: dict[str, Any]) -> None:
    """Print one comparison."""
    print(
        "{P} ranks, {S_Q:4} queries and {S_KV:5} keys each, ".format(**row)
        + ("recomputed" if row["recomputed"] else "kept      ")
        + "  compiled {compiled:.4f} s  eager {eager:.4f} s  ratio {ratio:.3f}".format(**row)
        + ", of processor time {processor:.3f}".format(**row),
        flush=True,
    )


if __name__ == "__main__":
    main()
