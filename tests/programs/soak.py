"""Solve random problems on random groups of the ranks of this run, and check every one.

    mpiexec -n 5 python -m mpi4py tests/programs/soak.py [PROBLEMS [FIRST_SEED]]

Rank 0 prints how far it is, and the worst error over its limit.  Then the first fifth of the
problems is solved three times more: what Python and NumPy hold must be the same after the last two.
(Of the process's memory much is the allocator's reserve, which wanders.)  Exit status 1 if a result
is wrong or memory grows.
"""

import gc
import sys
import tracemalloc
from time import perf_counter

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.common.handshake import SCHEDULES
from tests.cases import random_case
from tests.judge import solve, worst_ratios

# Caches of Python's may grow by so much; one block kept a problem is more.
FLAT = 2**16


def main() -> int:
    """Solve and check; return the exit status."""
    world = MPI.COMM_WORLD
    problems = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    seeds = range(first, first + problems)
    start, worst, wrong = perf_counter(), 0.0, 0
    for number, seed in enumerate(seeds, 1):
        ratio = solve_one(seed, world)
        worst, wrong = max(worst, ratio), wrong + (not ratio <= 1)
        if world.rank == 0 and not ratio <= 1:
            print(f"WRONG: seed {seed}, {random_case(seed)}: {ratio}", flush=True)
        if world.rank == 0 and number % max(1, problems // 10) == 0:
            spent = f"{number} problems, {perf_counter() - start:.0f} s"
            print(f"{spent}, worst error {worst:.3f} of its limit", flush=True)
    held = []
    tracemalloc.start()
    for _ in range(3):
        for seed in seeds[: max(1, problems // 5)]:
            solve_one(seed, world)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    grown = world.allreduce(held[2] - held[1], MPI.MAX)
    if world.rank == 0:
        print(f"{wrong} wrong; a rank grew by {grown / 1024:.0f} KiB at most, of {FLAT // 1024}")
    return int(wrong > 0 or grown > FLAT)


def solve_one(seed: int, world: MPI.Intracomm) -> float:
    """Solve one problem; return, on all ranks, its worst error over the limit."""
    rng = np.random.default_rng([seed, 1])  # the same on all ranks
    P = int(rng.integers(1, world.size + 1))
    members = rng.permutation(world.size)[:P].tolist()  # a group in any order
    schedule, reuse = str(rng.choice(SCHEDULES)), bool(rng.integers(2))
    colour = 0 if world.rank in members else MPI.UNDEFINED
    comm = world.Split(colour, members.index(world.rank) if world.rank in members else 0)
    ratio = 0.0
    if comm != MPI.COMM_NULL:
        problem = random_case(seed).on(schedule, comm.size).make()
        results = solve(problem, comm, mpi_impl, schedule=schedule, reuse_layout=reuse)
        if comm.rank == 0:  # the results are the whole, the same on all
            ratio = max(worst_ratios(problem, results).values())
        comm.Free()
    return float(max(world.allgather(ratio), key=lambda r: np.inf if np.isnan(r) else r))


if __name__ == "__main__":
    sys.exit(main())
