"""LV-XAttn against Ring Attention and against no communication, on links of a known rate.

    python benchmarks/network.py [--quick] [--only PART ...] [--store DIR]

Parts, each on the ranks of this machine, one BLAS thread a rank, which keep the memory that they
free:

    slow     4 hosts at 50 Mbit/s, which gives two CPU cores about the ratio of arithmetic to
             bandwidth of the paper's GPU cluster; forward and forward + backward
    sweep    1 Gbit/s and shared memory, short texts to long ones, grouped heads and not; forward
    bytes    the links' counters against the bytes counted, for two placements of ranks
    cores    two ranks against one

Prints a table in Markdown; `--store` writes it, and every single measurement as JSON, to DIR.
Exit status 2 where no cluster can be built (`netlab/lab.py` says what that needs).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import (
    Results,
    describe_run,
    exit_without_lab,
    mpirun,
    parser_for,
    printed_by,
    publish,
)
from netlab.lab import Lab, bits_per_second
from network_report import markdown

PROGRAM = [sys.executable, "-m", "mpi4py", str(Path(__file__).with_name("passes.py"))]

# glibc returns arrays that are freed to the system, and a virtual machine may return them to its
# host within seconds, which takes up to 20 times as long to provide them again as to write to them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}

# S_Q, S_KV of the sweep, and its heads: H, H_KV.
SIZES = [(16, 65536), (128, 65536), (512, 32768), (2048, 16384), (8192, 16384)]
QUICK_SIZES = [(16, 8192), (512, 4096), (4096, 1024)]
HEADS = [(8, 8), (8, 2)]


def slow(quick: bool) -> list[Results]:
    """Measure 4 hosts at 50 Mbit/s."""
    work = {"kinds": ["blocks", "lv-xattn", "ring"], "S_Q": 512, "S_KV": 65536, "backward": True}
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
    """Measure the bytes that leave each host, for two placements of 2 hosts of 2 ranks."""
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
        done = lab.mpiexec([*PROGRAM, json.dumps(works)], env=KEEP_MEMORY)
    where = {
        "hosts": hosts,
        "bits_per_second": bits_per_second(rate),
        "placement": lab.placement if lab.ranks_per_host > 1 else None,
    }
    return read(done, where)


def in_shared_memory(P: int, works: list[Results]) -> list[Results]:
    """Return the works' results from ranks that share this machine's memory."""
    done = mpirun(P, [*PROGRAM, json.dumps(works)], KEEP_MEMORY)
    return read(done, {"hosts": 1, "bits_per_second": None, "placement": None})


def read(done: "subprocess.CompletedProcess[str]", where: Results) -> list[Results]:
    """Return the results that `passes.py` printed, with the link."""
    printed = json.loads(printed_by(done))
    common = {**where, "messages_alone": printed["messages_alone"], "mpi": printed["mpi"]}
    print(".", end="", file=sys.stderr, flush=True)
    return [{**common, **result} for result in printed["results"]]


def main() -> None:
    """Run the parts, print the table, store it."""
    parser = parser_for(__doc__, "small problems, under 2 minutes", "store")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    measured = describe_run(options.quick)
    with exit_without_lab("network"):
        for part in options.only:
            measured[part] = PARTS[part](options.quick)
    print(file=sys.stderr)
    publish("network", measured, markdown(measured), options)


if __name__ == "__main__":
    main()
