"""Share the cores of a host between its ranks."""

import os

from mpi4py import MPI
from threadpoolctl import threadpool_limits

_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def limit_blas_threads(comm: MPI.Intracomm) -> None:
    """Give each rank its share of this host's cores for matrix products.

    Left alone, the library starts a thread a core on every rank, and the ranks of a host hinder one
    another. Does nothing if the user has set ``OMP_NUM_THREADS`` or its like. Collective: every rank
    of comm calls this.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    """
    neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = neighbours.size
    neighbours.Free()
    if any(name in os.environ for name in _VARIABLES):
        return
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threadpool_limits(max(1, cores // ranks), user_api="blas")
