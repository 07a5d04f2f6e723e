"""Give each rank its share of the cores; rank 0 prints, as JSON, what every rank then uses."""

import json
import sys

from mpi4py import MPI
from threadpoolctl import threadpool_info

from lvxattn import mpi_impl
from tests.cases import Case
from tests.judge import solve, worst_ratios

comm = MPI.COMM_WORLD
# Large enough for BLAS to start its threads.
problem = Case("threads", H=1, H_KV=1, S_Q=400, S_KV=2000, D=64, D_V=64, dtype="float32").make()


def right() -> bool:
    results = solve(problem, comm, mpi_impl)
    return comm.rank > 0 or max(worst_ratios(problem, results).values()) <= 1


before = right()
returned = mpi_impl.limit_blas_threads(comm)
used = sorted({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
ranks = comm.gather(
    {"right before": before, "right after": right(), "returned": returned, "used": used}
)
if comm.rank == 0:
    json.dump(ranks, sys.stdout)
