"""Attend again and again; the last rank of `eat_memory.py FILE` eats memory once FILE exists."""

import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from lvxattn.common.shared_memory import unlink_own_file
from lvxattn.mpi_impl import announce_death, cross_attention

comm, hungry = MPI.COMM_WORLD, Path(sys.argv[1])
announce_death(comm)
unlink_own_file()
x = np.ones((1, 1, 8, 4))
eaten = []
while len(eaten) < 500:  # 4 GB
    cross_attention(x, x, x, comm)
    if comm.rank == comm.size - 1 and hungry.exists():
        eaten.append(np.ones(10**6))
    time.sleep(0.02)
