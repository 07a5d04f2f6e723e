"""Count what every rank sends; rank 0 prints, as JSON, the counts of all ranks and passes.

The communicator that the library is given counts, beside the library's own meter.  For the last
problem ranks believe that they are on two hosts, in turns.
"""

import json
import sys
from collections import Counter
from typing import Any

from mpi4py import MPI

from lvxattn import mpi_impl
from tests.cases import Case
from tests.judge import worst_ratios
from tests.watched import Watched

world = MPI.COMM_WORLD
PROBLEMS = [
    Case("float64", cut="ragged"),
    Case("float32", cut="ragged", dtype="float32", D_V=5),
    Case("float16", cut="ragged", dtype="float16", D_V=5),
    Case("grouped", B=2, H=6, H_KV=2, cut="ragged", dtype="float32", mask="full"),
    Case("one key-value head", H=6, H_KV=1, dtype="float16"),
    Case("fewer queries than ranks", S_Q=2),
    Case("two hosts", cut="ragged"),
]


def traffic(watched: Watched, meter: Any, results: Any) -> dict[str, Any]:
    """Return what one rank sent in one pass."""
    by_tag: dict[str, list[int]] = {}
    for _, tag, size in watched.sent:
        by_tag.setdefault(str(tag), []).append(size)
    return {
        "metered": [meter.messages, meter.bytes],
        "sent": by_tag,
        "bytes received": sum(size for *_, size in watched.received),
        "to": sorted({dest for dest, *_ in watched.sent}),
        "from": sorted({source for source, *_ in watched.received}),
        "calls": Counter(watched.calls),
        "requests": len(watched.requests),
        "active": watched.active(),
        "seconds": [meter.computing, meter.waiting],
    }


report = {}
for case in PROBLEMS:
    problem = case.make()
    part = problem.part(world.rank, world.size)
    arguments = part["q"], part["k"], part["v"]
    options: dict[str, Any] = {"scale": problem.scale, "mask": part["mask"]}
    agreed: Any = Watched(world)
    if case.name == "two hosts":
        agreed.host = f"host {world.rank % 2}"
    layout = mpi_impl.Layout.agree(*arguments, agreed, **options)
    forward: Any = Watched(world)
    backward: Any = Watched(world)
    meters = mpi_impl.Meter(), mpi_impl.Meter()
    out, lse = mpi_impl.cross_attention(
        *arguments, forward, **options, layout=layout, meter=meters[0]
    )
    gradients = mpi_impl.cross_attention_backward(
        part["dout"], *arguments, out, lse, backward, **options, dlse=part["dlse"],
        layout=layout, meter=meters[1],
    )  # fmt: skip
    passes = {
        "forward": traffic(forward, meters[0], (out, lse)),
        "backward": traffic(backward, meters[1], gradients),
    }
    names = "out", "lse", "dq", "dk", "dv"
    whole = {
        n: mpi_impl.unshard(x, world) for n, x in zip(names, (out, lse, *gradients), strict=True)
    }
    worst = max(worst_ratios(problem, whole).values())
    ranks = world.gather(passes)
    report[case.name] = {"order": layout.order, "worst": worst, "ranks": ranks}
if world.rank == 0:
    json.dump(report, sys.stdout)
