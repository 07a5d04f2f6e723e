"""Solve random problems on random groups of the ranks of this run, and check every one.

    mpiexec -n 5 python -m mpi4py tests/programs/soak.py [PROBLEMS [FIRST_SEED]]

Rank 0 prints how far it is, the worst error over its limit, and how the memory of the ranks has
grown since the first fifth of the problems.  Exit status 1 if a result is wrong or memory grows.
"""

import sys
from pathlib import Path
from time import perf_counter

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.reference.agreement import SCHEDULES
from tests.cases import random_case
from tests.judge import solve, worst_ratios

# Resident memory may wander by so much (arrays of a problem, the allocator's reserve) but no more.
FLAT = 16 * 2**20


def main() -> int:
    """Solve and check; return the exit status."""
    world = MPI.COMM_WORLD
    problems = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    start, worst, wrong = perf_counter(), 0.0, 0
    memory = np.zeros(problems)
    for number in range(problems):
        ratio = solve_one(first + number, world)
        worst, wrong = max(worst, ratio), wrong + (not ratio <= 1)
        memory[number] = resident()
        if world.rank == 0 and not ratio <= 1:
            print(f"WRONG: seed {first + number}, {random_case(first + number)}: {ratio}")
        if world.rank == 0 and (number + 1) % max(1, problems // 10) == 0:
            spent = f"{number + 1} problems, {perf_counter() - start:.0f} s"
            print(f"{spent}, worst error {worst:.3f} of its limit", flush=True)
    fifth = max(1, problems // 5)
    grown = np.median(memory[-fifth:]) - np.median(memory[fifth : 2 * fifth])
    grown = world.allreduce(float(grown), MPI.MAX)
    if world.rank == 0:
        print(
            f"{wrong} wrong; a rank grew by {grown / 2**20:.1f} MiB at most, of {FLAT / 2**20:.0f}"
        )
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
        problem = random_case(seed).make()
        results = solve(problem, comm, mpi_impl, schedule=schedule, reuse_layout=reuse)
        if comm.rank == 0:  # the results are the whole, the same on all
            ratio = max(worst_ratios(problem, results).values())
        comm.Free()
    return float(max(world.allgather(ratio), key=lambda r: np.inf if np.isnan(r) else r))


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    sys.exit(main())
