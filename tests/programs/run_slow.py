"""Solve problems with synchronous sends and random delays; rank 0 prints the verdicts as JSON.

Arguments: how many seeds, and the longest delay in seconds.  Delays fall before and after every
shift, wait and local attention, and before every send.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.mpi_impl import exchange, lv_xattn
from tests.cases import Case
from tests.judge import solve, worst_ratios
from tests.watched import Synchronous

world = MPI.COMM_WORLD
seeds, longest = int(sys.argv[1]), float(sys.argv[2])
comm: Any = None


def dawdling(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        comm.dawdle()
        result = function(*args, **kwargs)
        comm.dawdle()
        return result

    return slow


exchange.Rotation.start = dawdling(exchange.Rotation.start)  # type: ignore[method-assign]
exchange.Rotation.receive = dawdling(exchange.Rotation.receive)  # type: ignore[method-assign]
lv_xattn.partial_attention = dawdling(lv_xattn.partial_attention)  # type: ignore[attr-defined]
lv_xattn.block_attention_backward = dawdling(  # type: ignore[attr-defined]
    lv_xattn.block_attention_backward
)

verdicts = []
for seed in range(seeds):
    comm = Synchronous(world, seed, longest)
    # Blocks of a few bytes, and of 300 kB that no MPI sends eagerly.
    rows = 40 if seed % 2 else 10_000
    problem = Case(f"slow {seed}", S_Q=rows, S_KV=12, H=2, H_KV=1, cut="ragged").make()
    results = solve(problem, comm, mpi_impl)
    right = world.rank > 0 or max(worst_ratios(problem, results).values()) <= 1
    verdicts.append([right, comm.active() == 0, comm.calls["Isend"] == 4 * (world.size - 1)])
report = world.gather(verdicts)
if world.rank == 0:
    json.dump(report, sys.stdout)
