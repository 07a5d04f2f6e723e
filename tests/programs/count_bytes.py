"""Do a forward and a backward pass; rank 0 prints, as JSON, what every rank counted and its host.

count_bytes.py S_Q S_KV
"""

import json
import socket
import sys

import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl import Layout, Meter, cross_attention, cross_attention_backward

comm = MPI.COMM_WORLD
s_q, s_kv = (int(n) // comm.size for n in sys.argv[1:])
q, dout = np.ones((2, 1, 8, s_q, 64), np.float32)
k, v = np.ones((2, 1, 8, s_kv, 64), np.float32)
layout, meter = Layout.agree(q, k, v, comm), Meter()
out, lse = cross_attention(q, k, v, comm, layout=layout, meter=meter)
cross_attention_backward(dout, q, k, v, out, lse, comm, layout=layout, meter=meter)
hosts = comm.allgather(socket.gethostname())
report = comm.gather((hosts[comm.rank], meter.bytes, hosts[layout.right]))
if report:
    json.dump(report, sys.stdout)
