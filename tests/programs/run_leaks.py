"""Take all communicators but a few, and call what makes or uses some: a leak runs out of them.

MPICH has 2048; of an MPI that has more all is well after so many.  Rank 0 prints "true".
"""

import sys

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl

world = MPI.COMM_WORLD
world.Set_errhandler(MPI.ERRORS_RETURN)
taken = []
try:
    while len(taken) < 4096:
        taken.append(world.Dup())
except MPI.Exception:
    pass
for comm in taken[-4:]:
    comm.Free()
q = np.ones((1, 1, 1, 1))
for _ in range(8):
    mpi_impl.limit_blas_threads(world)
    out, lse = mpi_impl.cross_attention(q, q, q, world)
    mpi_impl.cross_attention_backward(out, q, q, q, out, lse, world)
for comm in taken[:-4]:
    comm.Free()
if world.rank == 0:
    sys.stdout.write("true")
