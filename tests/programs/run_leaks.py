"""Call what makes or uses communicators until one that is leaked would have run out of them.

MPICH has 2048.  Rank 0 prints "true" when all is well; otherwise MPI has ended the program.
"""

import sys

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl

comm = MPI.COMM_WORLD
q = np.ones((1, 1, 1, 1))
for _ in range(2100):
    mpi_impl.limit_blas_threads(comm)
    out, lse = mpi_impl.cross_attention(q, q, q, comm)
    mpi_impl.cross_attention_backward(out, q, q, q, out, lse, comm)
if comm.rank == 0:
    sys.stdout.write("true")
