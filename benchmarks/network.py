"""LV-XAttn against Ring Attention and against no communication, on links of a known rate.

    python benchmarks/network.py [--quick] [--only PART ...] [--store DIR]

Parts, each on the ranks of this machine, one BLAS thread a rank:

    slow     4 hosts at 50 Mbit/s, which gives two CPU cores about the ratio of arithmetic to
             bandwidth of the paper's GPU cluster; forward and forward + backward
    sweep    1 Gbit/s and shared memory, short texts to long ones, grouped heads and not; forward
    bytes    what the links' counters saw against what was counted, and placement of ranks
    cores    two ranks against one

Prints a table in Markdown; `--store` writes it, and every single measurement as JSON, to DIR.
Exit status 2 where no cluster can be built (`netlab/lab.py` says what that needs).
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from machine import describe
from netlab.lab import Lab, LabError, bits_per_second, find_mpiexec
from report import markdown

Results = dict[str, Any]
PROGRAM = [sys.executable, "-m", "mpi4py", str(Path(__file__).with_name("passes.py"))]

# S_Q, S_KV of the sweep, and its heads: H, H_KV.
SIZES = [(16, 65536), (128, 65536), (512, 32768), (2048, 16384), (8192, 16384)]
QUICK_SIZES = [(16, 8192), (512, 4096), (4096, 1024)]
HEADS = [(8, 8), (8, 2)]


def slow(quick: bool) -> list[Results]:
    """Measure 4 hosts at 50 Mbit/s."""
    work = {"kinds": ["none", "lv-xattn", "ring"], "S_Q": 512, "S_KV": 65536, "backward": True}
    often = {"rounds": 20, "ring_every": 10, "seconds": 400}
    if quick:
        work |= {"S_Q": 128, "S_KV": 8192}
        often = {"rounds": 4, "ring_every": 4, "seconds": 30}
    return on_hosts(4, "50mbit", [{**work, **often}])


def sweep(quick: bool) -> list[Results]:
    """Measure 1 Gbit/s and shared memory over sizes and heads."""
    common = {"kinds": ["none", "lv-xattn", "ring"], "rounds": 25, "ring_every": 2}
    works = [
        {**common, "S_Q": S_Q, "S_KV": S_KV, "H": H, "H_KV": H_KV, "seconds": 1 if quick else 5}
        for H, H_KV in HEADS
        for S_Q, S_KV in (QUICK_SIZES if quick else SIZES)
    ]
    return [
        *on_hosts(2, "1gbit", works),
        *on_hosts(4, "1gbit", works),
        *in_shared_memory(2, works),
        *in_shared_memory(4, works),
    ]


def bytes_sent(quick: bool) -> list[Results]:
    """Measure what leaves each host, 2 hosts of 2 ranks placed in two ways."""
    work = {"kinds": ["lv-xattn", "ring"], "S_Q": 4096, "S_KV": 8192, "backward": True}
    work |= {"rounds": 1 if quick else 3}
    return [
        *on_hosts(2, "1gbit", [work], ranks_per_host=2, placement="block"),
        *on_hosts(2, "1gbit", [work], ranks_per_host=2, placement="cyclic"),
    ]


def cores(quick: bool) -> list[Results]:
    """Measure two ranks against one."""
    work = {"kinds": ["one", "lv-xattn", "each"], "S_Q": 512, "S_KV": 32768, "backward": True}
    if quick:
        work |= {"S_KV": 4096}
    return in_shared_memory(2, [{**work, "rounds": 3 if quick else 7, "seconds": 45}])


PARTS = {"slow": slow, "sweep": sweep, "bytes": bytes_sent, "cores": cores}


def on_hosts(hosts: int, rate: str, works: list[Results], **placed: Any) -> list[Results]:
    """Return the works' results from a cluster of shaped links."""
    with Lab(hosts, rate, **placed) as lab:
        done = lab.mpiexec([*PROGRAM, json.dumps(works)])
    where = {
        "hosts": hosts,
        "bits_per_second": bits_per_second(rate),
        "placement": lab.placement if lab.ranks_per_host > 1 else None,
    }
    return read(done, where)


def in_shared_memory(P: int, works: list[Results]) -> list[Results]:
    """Return the works' results from ranks that share this machine's memory."""
    command = [*find_mpiexec(), "-n", str(P), *PROGRAM, json.dumps(works)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return read(done, {"hosts": 1, "bits_per_second": None, "placement": None})


def read(done: "subprocess.CompletedProcess[str]", where: Results) -> list[Results]:
    """Return what `passes.py` printed, with where it ran."""
    if done.returncode:
        raise RuntimeError(f"passes.py ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    printed = json.loads(done.stdout)
    common = {**where, "messages_alone": printed["messages_alone"], "mpi": printed["mpi"]}
    print(".", end="", file=sys.stderr, flush=True)
    return [{**common, **result} for result in printed["results"]]


def main() -> int:
    """Run the parts, print the table, store it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small problems, under 2 minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--store", metavar="DIR", type=Path)
    options = parser.parse_args()
    measured: Results = {
        "machine": describe(),
        "date": date.today().isoformat(),
        "quick": options.quick,
    }
    try:
        for part in options.only:
            measured[part] = PARTS[part](options.quick)
    except LabError as reason:
        print(f"network: {reason}", file=sys.stderr)
        return 2
    print(file=sys.stderr)
    text = markdown(measured)
    print(text, end="")
    if options.store:
        options.store.mkdir(parents=True, exist_ok=True)
        (options.store / "network.json").write_text(json.dumps(measured) + "\n")
        (options.store / "network.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
