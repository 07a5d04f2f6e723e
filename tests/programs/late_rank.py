"""Passes in which one rank is late, on one host or as if on two.

usage: late_rank.py HOSTS RANK SECONDS GRACE
"""

import socket
import sys
import time

import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl import Layout, cross_attention
from lvxattn.mpi_impl.transport import watchdog

hosts, late, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
watchdog.GRACE = float(sys.argv[4])
comm = MPI.COMM_WORLD
socket.gethostname = lambda: f"host{comm.rank % hosts}"

rng = np.random.default_rng(comm.rank)
q, k, v = (rng.standard_normal((1, 2, 8, 8)) for _ in range(3))
layout = Layout.agree(q, k, v, comm, schedule="gather")
first, _ = cross_attention(q, k, v, comm, layout=layout)
if comm.rank == late:
    time.sleep(seconds)
for _ in range(3):
    again, _ = cross_attention(q, k, v, comm, layout=layout)
    assert np.allclose(again, first, rtol=0, atol=1e-12)
print("as before", flush=True)
