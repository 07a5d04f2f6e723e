"""On two hosts: send one block after idling; print seconds over size over rate, for each try.

send_block.py BYTES BITS_PER_SECOND TRIES
"""

import sys
from time import perf_counter, sleep

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
size, rate, tries = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
block = np.ones(size, np.uint8)
for _ in range(tries + 1):  # the first connects
    comm.Barrier()
    sleep(0.1)  # the bucket fills
    start = comm.bcast(perf_counter())  # one machine, one clock
    if comm.rank == 0:
        comm.Send(block, 1)
    else:
        comm.Recv(block, 0)
        print((perf_counter() - start) / (8 * size / rate), flush=True)
