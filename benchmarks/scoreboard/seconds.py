"""Time packages against this project's lv-xattn, in turns, on the same ranks.

    python -m benchmarks.scoreboard.seconds [--ranks 2 4] [--rounds N] [--rate 1gbit]

All functions of `FUNCTIONS` are in one environment, and in one program on every rank, which times
them in turns: forward, then forward and backward.  Stored are the median of our lv-xattn and, of
each other, that over rounds of its ratio to lv-xattn.  S_Q = 512, S_KV = 32,768, 8 heads of 64,
fp32.  Ranks are in shared memory or, with --rate, on hosts of `benchmarks/netlab`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.netlab.lab import Lab, LabError, address
from benchmarks.scoreboard.entries import Entry, environments
from benchmarks.scoreboard.environments import ROOT, last_words, python_of
from benchmarks.scoreboard.processes import run

_ALL = (2, 3, 4)
# The adapter, and the numbers of ranks on which the function has a backward, and a right one.
FUNCTIONS: dict[str, tuple[str, tuple[int, ...]]] = {
    "lv-xattn": ("ours:lv_xattn", _ALL),
    "gather": ("ours:gather", _ALL),
    "ring": ("ours:ring", _ALL),
    "Ulysses": ("ours:ulysses", _ALL),
    "diffusers ring": ("diffusers_context_parallel:ring", (2,)),
    "diffusers Ulysses": ("diffusers_context_parallel:ulysses", ()),  # for S_Q = S_KV only
    "yunchang ring": ("yunchang_attention:ring_flash", ()),
    "yunchang Ulysses": ("yunchang_attention:ulysses", _ALL),
    "DeepSpeed Ulysses": ("deepspeed_ulysses:ulysses", _ALL),
    "PyTorch allgather": ("torch_context_parallel:allgather", _ALL),
    "PyTorch alltoall": ("torch_context_parallel:alltoall", _ALL),
}
SIZES = {"B": 1, "H": 8, "S_Q": 512, "S_KV": 32768, "D": 64}
Json = dict[str, Any]


def main() -> int:
    """Run the programs, and store their results beside those of the checks."""
    from benchmarks.scoreboard.__main__ import CACHE

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoreboard.seconds", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[2, 4], metavar="P", help="none: only --about"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--rate", metavar="RATE", help="of each host's link: 1gbit, 100mbit")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR")
    parser.add_argument("--about", metavar="TEXT", help="what to say of the machine")
    parser.add_argument("--seconds", type=int, default=900, help="of one program")
    options = parser.parse_args()
    together = Entry("", "", "", "seconds", environments()["seconds"], "", "")
    python = python_of(together, options.cache)
    for P in options.ranks:
        work = {"rounds": options.rounds, "functions": FUNCTIONS, "sizes": SIZES}
        try:
            found = measured(python, P, options.rate, work, options.seconds)
        except (LabError, RuntimeError) as error:
            sys.stderr.write(f"{P} ranks: {error}\n")
            return 1
        for line in found:
            print(P, line["network"], line["pass"], line["seconds"], line["ratios"], flush=True)
        _store(found, options.about)
    if not options.ranks:
        _store([], options.about)
    return 0


def _store(found: list[Json], about: str | None) -> None:
    """Replace stored results of the same ranks, network and pass; write the page."""
    from benchmarks.scoreboard.__main__ import PAGE, RESULTS
    from benchmarks.scoreboard.table import page
    from lvxattn.common.new_file import write_file

    results = json.loads(RESULTS.read_text())
    stored = results.get("seconds", {"about": "", "runs": []})
    what = [_what(line) for line in found]
    runs = found + [line for line in stored["runs"] if _what(line) not in what]
    about = stored["about"] if about is None else about
    results["seconds"] = {"about": about, "runs": sorted(runs, key=_what)}
    write_file(RESULTS, json.dumps(results, indent=1) + "\n")
    write_file(PAGE, page([*results["outcomes"].values()], results["seconds"]))


def _what(line: Json) -> tuple[bool, str, int, str]:
    return "memory" not in line["network"], line["network"], line["ranks"], line["pass"]


def measured(python: Path, P: int, rate: str | None, work: Json, seconds: float) -> list[Json]:
    """Return the results of one program: forward, then forward and backward.

    Raises
    ------
    RuntimeError
        With the program's last words.
    LabError
        There can be no shaped network here.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environ["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    shown = (rate or "").replace("mbit", " Mbit/s").replace("gbit", " Gbit/s")
    network = shown or "shared memory"
    with tempfile.TemporaryDirectory(prefix="scoreboard-") as folder:
        path = Path(folder) / "seconds.json"
        text = json.dumps({**work, "network": network, "json": str(path)})
        program = ["-m", "benchmarks.scoreboard.seconds", text]
        if rate:
            status, output = _on_hosts(P, rate, [str(python), *program], environ, folder, seconds)
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(P)]
            done = run([str(python), *launcher, *program], environ, seconds)
            status, output = done.status, done.output
        if status != 0 or not path.exists():
            raise RuntimeError(
                f"ended after {seconds:g} s" if status is None else last_words(output)
            )
        found: list[Json] = json.loads(path.read_text())
    return found


def _on_hosts(
    P: int, rate: str, command: list[str], environ: dict[str, str], folder: str, seconds: float
) -> tuple[int | None, str]:
    """Run a command on every host; return the first status that is not 0, and all output."""
    environ |= {"WORLD_SIZE": str(P), "MASTER_ADDR": address(0), "MASTER_PORT": "29500"}
    environ |= {"GLOO_SOCKET_IFNAME": "e0", "TP_SOCKET_IFNAME": "e0"}
    output = Path(folder) / "output"
    deadline = time.monotonic() + seconds
    with output.open("a") as written, Lab(P, rate, shared=[folder]) as lab:
        ranks = [
            lab.start(
                host,
                command,
                env=environ | {"RANK": str(host), "LOCAL_RANK": "0"},
                stdout=written,
                stderr=subprocess.STDOUT,
            )
            for host in range(P)
        ]
        waiting, status = [*ranks], 0
        while waiting and not status and time.monotonic() < deadline:
            time.sleep(0.1)
            waiting = [rank for rank in waiting if rank.poll() is None]
            status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    for rank in ranks:
        rank.wait()  # they end with the lab
    return (None if waiting and not status else status), output.read_text()


def rank(work: Json) -> None:
    """Time the functions on one of the ranks.  Collective."""
    import torch
    import torch.distributed as dist

    from benchmarks.scoreboard.adapters import limits

    limits.CHECKED = False  # the shards are equal here
    # First: what they import may keep the default group alive until Python exits, and gloo's
    # threads may abort the process then.
    loaded = {name: (_loaded(adapter), on) for name, (adapter, on) in work["functions"].items()}
    dist.init_process_group("gloo")
    P, group = dist.get_world_size(), dist.group.WORLD
    torch.manual_seed(dist.get_rank())
    B, H, S_Q, S_KV, D = (work["sizes"][name] for name in ("B", "H", "S_Q", "S_KV", "D"))
    q, dout = (torch.randn(B, H, S_Q // P, D) for _ in range(2))
    k, v = (torch.randn(B, H, S_KV // P, D) for _ in range(2))
    functions = {name: (fn, P in backward_on) for name, (fn, backward_on) in loaded.items()}

    def timed(fn: Any, backward: bool) -> float:
        leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
        dist.barrier()
        start = time.perf_counter()
        out = fn(*leaves, group, scale=D**-0.5, mask=None)
        if backward:
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, leaves, dout)
        slowest = torch.tensor(time.perf_counter() - start)
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
                "network": work["network"],
                "pass": "forward and backward" if backward else "forward",
                "rounds": work["rounds"],
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
