"""A decode step, one query against many keys on four ranks, with its messages and without.

    python benchmarks/decode.py [--quick] [--store DIR]

    gather, lv-xattn    the query is the last rank's, the others have none
    replicated          every rank has the query, as where the text is not sharded

Forward, with one layout, over MPI and over gloo.  All take turns in every round, in alternating
order, each with its messages and with messages that are switched off: a rank then receives zeros,
and all else is done as otherwise.  A turn takes as long as its slowest rank; ratios are medians
over rounds.  Also what a layout for another number of queries costs.

Prints a table in Markdown; `--store` writes it, and every turn as JSON, to DIR.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench import Results, describe_run, mpirun, parser_for, printed_by, publish
from mpi4py import MPI

from lvxattn import mpi_impl, torch_impl

H, H_KV, D, P, S_KV = 8, 2, 64, 4, 65536
WAYS = "gather", "lv-xattn", "replicated"
NAMES = {"mpi": "MPI", "torch": "PyTorch"}


class QuietComm:
    """A communicator that sends nothing: what is received is zeros."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.allgather = comm.allgather  # of the agreement, which no step needs

    def Isend(self, *_: Any) -> MPI.Request:
        """Return a request that is complete."""
        return MPI.Request()

    def Irecv(self, buffer: list[Any], *_: Any) -> MPI.Request:
        """Fill the buffer."""
        buffer[0][...] = 0
        return MPI.Request()

    def Iallreduce(self, sent: Any, room: list[Any], **_: Any) -> MPI.Request:  # noqa: ARG002
        """Fill the room."""
        return self.Irecv(room)

    Ireduce_scatter = Iallreduce


class Done:
    """A message that has arrived."""

    def wait(self) -> None:
        """Return."""


@contextmanager
def quiet() -> Iterator[None]:
    """Switch PyTorch's messages off: what is received is zeros."""
    batch, exchange = dist.batch_isend_irecv, dist.all_to_all_single

    def fill_batch(ops: list[Any]) -> list[Any]:
        for op in ops:
            if op.op is dist.irecv:
                op.tensor.zero_()
        return [Done() for _ in ops]

    dist.batch_isend_irecv = fill_batch
    dist.all_to_all_single = lambda room, *_, **__: room.zero_()
    try:
        yield
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = batch, exchange


def turns_of(work: Results) -> dict[str, Callable[[], object]]:
    """Return what takes turns, by name: the implementation, the way, "on" or "off".  Collective."""
    comm, found = MPI.COMM_WORLD, {}
    rng = np.random.default_rng(comm.rank)
    s_kv = work["S_KV"] // comm.size
    k, v = rng.standard_normal((2, 1, H_KV, s_kv, D), np.float32)
    for way in WAYS:
        whole = way == "replicated"
        mine = 1 if whole or comm.rank == comm.size - 1 else 0
        q = rng.standard_normal((1, H, mine, D), np.float32)
        how: dict[str, Any] = {"queries": "replicated" if whole else "sharded"}
        agreed = {**how, "schedule": "lv-xattn" if whole else way}
        queries = 1 if whole else [0] * (comm.size - 1) + [1]

        for name, given, group, quieted, implementation in (
            ("mpi", (q, k, v), comm, QuietComm(comm), mpi_impl),
            ("torch", tuple(map(torch.from_numpy, (q, k, v))), None, None, torch_impl),
        ):
            layout = implementation.Layout.agree(*given, group, **agreed)
            step = partial(implementation.cross_attention, *given, layout=layout, **how)
            if name == "mpi":
                found[f"{name}, {way}, on"] = partial(step, comm=comm)
                found[f"{name}, {way}, off"] = partial(step, comm=quieted)
            else:
                found[f"{name}, {way}, on"] = step
                found[f"{name}, {way}, off"] = quiet()(step)
            if whole:
                found[f"{name}, agree"] = partial(
                    implementation.Layout.agree,
                    *given,
                    group,
                    **agreed,
                )
                found[f"{name}, with_queries"] = partial(layout.with_queries, queries, group)
    return found


def on_a_rank(work: Results) -> Results:
    """Time all turns.  Collective; the result is the same on every rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{work['store']}",
        rank=MPI.COMM_WORLD.rank, world_size=MPI.COMM_WORLD.size,
    )  # fmt: skip
    turns = turns_of(work)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    start = perf_counter()
    with torch.inference_mode():
        for number in range(work["rounds"] + 2):
            if number > 7 and slowest(perf_counter() - start) > work["seconds"]:
                break
            for name in list(turns)[:: 1 if number % 2 else -1]:
                dist.barrier()
                begin = perf_counter()
                turns[name]()
                taken = slowest(perf_counter() - begin)
                if number > 1:  # the first ones warm up
                    seconds[name].append(taken)
    dist.destroy_process_group()
    mpi = " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").split())
    return {"P": MPI.COMM_WORLD.size, "S_KV": work["S_KV"], "mpi": mpi, "turns": seconds}


def slowest(seconds: float) -> float:
    """Return the largest of all ranks'.  Collective."""
    largest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def measure(quick: bool) -> Results:
    """Measure on ranks of this machine."""
    work = {"S_KV": 4096 if quick else S_KV}
    work |= {"rounds": 5 if quick else 60, "seconds": 10 if quick else 90}
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps({**work, "store": f"{folder}/store"})
        command = [sys.executable, "-m", "mpi4py", __file__, "--on-a-rank", given]
        printed = printed_by(mpirun(P, command))
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


def markdown(measured: Results) -> str:
    """Return the report."""
    machine, turns = measured["machine"], measured["turns"]
    lines = [
        "# A decode step, with and without its messages",
        "",
        f"Measured {measured['date']} on {machine['processor']}, {machine['cores']} cores, load "
        f"{measured['load'][0]:.1f} to {measured['load'][1]:.1f}, Python {machine['python']}, "
        f"NumPy {machine['numpy']}, {machine['blas']}, {measured['mpi']}, PyTorch "
        f"{measured['torch']}, gloo; {measured['P']} ranks of one thread, S_Q = 1, S_KV = "
        f"{measured['S_KV']:,}, B = 1, heads {H}/{H_KV}, D = {D}, fp32. Made by "
        "`python benchmarks/decode.py --store benchmarks/results`; `decode.json` has every turn.",
        "",
        "Medians over rounds; off: nothing is sent, and zeros are received. The ratio is the "
        "median of rounds' ratios.",
        "",
        "| | way | step | messages off | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, label in NAMES.items():
        for way in WAYS:
            on, off = (turns[f"{name}, {way}, {which}"] for which in ("on", "off"))
            ratio = median(a / b for a, b in zip(on, off, strict=True))
            lines.append(f"| {label} | {way} | {ms(on)} | {ms(off)} | {ratio:.2f} |")
    lines += ["", "A layout for another number of queries, replicated:", ""]
    lines += ["| | `Layout.agree` | `with_queries`, compared |", "|---|---|---|"]
    for name, label in NAMES.items():
        agree, other = (turns[f"{name}, {what}"] for what in ("agree", "with_queries"))
        lines.append(f"| {label} | {ms(agree)} | {ms(other)} |")
    return "\n".join([*lines, ""])


def ms(seconds: list[float]) -> str:
    """Format the median."""
    return f"{median(seconds) * 1e3:.2f} ms"


def main() -> None:
    """Measure, print, store; or work as a rank."""
    parser = parser_for(__doc__, "few keys, few rounds", "store")
    parser.add_argument("--on-a-rank", help=argparse.SUPPRESS, type=json.loads)
    options = parser.parse_args()
    if options.on_a_rank:
        found = on_a_rank(options.on_a_rank)
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps(found), flush=True)
        return
    load = os.getloadavg()[0]
    found = {**describe_run(options.quick), **measure(options.quick), "torch": torch.__version__}
    measured = {**found, "load": [load, os.getloadavg()[0]]}
    publish("decode", measured, markdown(measured), options)


if __name__ == "__main__":
    main()
