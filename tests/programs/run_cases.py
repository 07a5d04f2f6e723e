"""Solve every case on the ranks of this run; rank 0 prints, as JSON, how far off each result is."""

import json
import sys

from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.reference.agreement import SCHEDULES
from tests.cases import CASES
from tests.judge import solve, worst_ratios

comm = MPI.COMM_WORLD
report = {}
for case in CASES:
    problem = case.make()
    for schedule in SCHEDULES:
        results = solve(problem, comm, mpi_impl, schedule=schedule)
        if comm.rank == 0:
            report[f"{schedule}: {case.name}"] = worst_ratios(problem, results)
if comm.rank == 0:
    json.dump(report, sys.stdout)
