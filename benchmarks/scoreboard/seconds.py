"""Time packages against this project's lv-xattn, in turns, on the same ranks.

    python -m benchmarks.scoreboard.seconds [--ranks 2 4] [--rounds N] [--cache DIR] [--here]

For every environment that has a function in `PEERS` one torchrun program times our schedules and
the package's functions in turn, forward, and forward and backward; stored are our median and the
median over rounds of each ratio to ours.  S_Q = 512, S_KV = 32,768, 8 heads of 64, fp32.
"""

import argparse
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.scoreboard.entries import entries
from benchmarks.scoreboard.environments import ROOT, last_words, python_of
from benchmarks.scoreboard.processes import run

OURS = {"lv-xattn": "ours:lv_xattn", "gather": "ours:gather"}
# By environment: a name, the adapter, and whether it has a backward.
PEERS = {
    "diffusers-042": {
        "diffusers ring": ("diffusers_context_parallel:ring", True),
        # Its backward does not run where S_Q is not S_KV.
        "diffusers Ulysses": ("diffusers_context_parallel:ulysses", False),
    },
    "yunchang": {
        "yunchang ring": ("yunchang_attention:ring_flash", False),
        "yunchang Ulysses": ("yunchang_attention:ulysses", True),
    },
    "deepspeed": {"DeepSpeed Ulysses": ("deepspeed_ulysses:ulysses", True)},
}
_SIZES = {"B": 1, "H": 8, "S_Q": 512, "S_KV": 32768, "D": 64}
_SECONDS = 900  # of one program
Json = dict[str, Any]


def main() -> int:
    """Run the programs, and store their results beside those of the checks."""
    from benchmarks.scoreboard.__main__ import CACHE, PAGE, RESULTS
    from benchmarks.scoreboard.table import page
    from lvxattn.common.new_file import write_file

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoreboard.seconds", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="P")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--about", default="", metavar="TEXT", help="what to say of the machine")
    options = parser.parse_args()
    places = {entry.environment: entry for entry in entries()}
    runs: list[Json] = []
    for P in options.ranks:
        for name in options.only:
            python = python_of(places[name], options.cache)
            runs += measured(python, P, options.rounds, PEERS[name], _SIZES)
            for line in runs[-2:]:
                print(P, line["pass"], f"{line['seconds']:.3f} s", line["ratios"], flush=True)
    results = json.loads(RESULTS.read_text())
    cores = len(os.sched_getaffinity(0))
    about = (
        f"S_Q = 512, S_KV = 32,768, 8 heads of 64, fp32, in shared memory on {cores} cores, "
        f"medians of {options.rounds} rounds in turns.{options.about and ' ' + options.about}"
    )
    results["seconds"] = {"about": about, "runs": runs}
    write_file(RESULTS, json.dumps(results, indent=1) + "\n")
    write_file(PAGE, page([*results["outcomes"].values()], results["seconds"]))
    return 0


def measured(
    python: Path, P: int, rounds: int, peers: dict[str, tuple[str, bool]], sizes: dict[str, int]
) -> list[Json]:
    """Return the results of one program: forward, then forward and backward.

    Raises
    ------
    RuntimeError
        With the program's last words.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environ["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    with tempfile.TemporaryDirectory(prefix="scoreboard-") as folder:
        path = Path(folder) / "seconds.json"
        work = json.dumps({"rounds": rounds, "peers": peers, "sizes": sizes, "json": str(path)})
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(P)]
        command = [str(python), *launcher, "-m", "benchmarks.scoreboard.seconds", work]
        done = run(command, environ, _SECONDS)
        if done.status != 0 or not path.exists():
            raise RuntimeError(f"{P} ranks: {last_words(done.output)}")
        found: list[Json] = json.loads(path.read_text())
    return found


def rank(work: Json) -> None:
    """Time the functions on one of the ranks.  Collective."""
    import torch
    import torch.distributed as dist

    from benchmarks.scoreboard.adapters import limits

    limits.CHECKED = False  # the shards are equal here
    dist.init_process_group("gloo")
    P, group = dist.get_world_size(), dist.group.WORLD
    torch.manual_seed(dist.get_rank())
    B, H, S_Q, S_KV, D = (work["sizes"][name] for name in ("B", "H", "S_Q", "S_KV", "D"))
    q, dout = (torch.randn(B, H, S_Q // P, D) for _ in range(2))
    k, v = (torch.randn(B, H, S_KV // P, D) for _ in range(2))
    functions = {name: (_loaded(target), True) for name, target in OURS.items()}
    functions |= {name: (_loaded(a), back) for name, (a, back) in work["peers"].items()}

    def timed(fn: Any, backward: bool) -> float:
        leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
        dist.barrier()
        start = perf_counter()
        out = fn(*leaves, group, scale=D**-0.5, mask=None)
        if backward:
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, leaves, dout)
        slowest = torch.tensor(perf_counter() - start)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    found = []
    for backward in (False, True):
        chosen = {name: fn for name, (fn, back) in functions.items() if back or not backward}
        times: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in range(work["rounds"] + 1):
            for name, fn in chosen.items():
                seconds = timed(fn, backward)
                if turn:  # the first warms up
                    times[name].append(seconds)
        ours = times["lv-xattn"]
        ratios = {
            name: median(x / y for x, y in zip(theirs, ours, strict=True))
            for name, theirs in times.items()
            if name != "lv-xattn"
        }
        found.append(
            {
                "ranks": P,
                "network": "shared memory",
                "pass": "forward and backward" if backward else "forward",
                "seconds": median(ours),
                "ratios": ratios,
            }
        )
    if dist.get_rank() == 0:
        Path(work["json"]).write_text(json.dumps(found))
    dist.destroy_process_group()


def _loaded(adapter: str) -> Any:
    module, _, name = adapter.partition(":")
    return getattr(import_module(f"benchmarks.scoreboard.adapters.{module}"), name)


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(json.loads(sys.argv[1]))
    else:
        sys.exit(main())
