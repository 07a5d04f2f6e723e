"""Two ranks send one another a block of more than 2**31 bytes, and look at what has come."""

import sys

import numpy as np
from mpi4py import MPI

from lvxattn.common.wire import BLOCKS, Field, Kind
from lvxattn.mpi_impl import Meter
from lvxattn.mpi_impl.exchange import Exchange
from lvxattn.reference import Layout

comm = MPI.COMM_WORLD
x = np.zeros((1, 1, 1, 1), np.uint8)
SIZE = 2**31 + 4097
layout = Layout(
    rank=comm.rank, order=(0, 1), s_q=(SIZE, SIZE), s_kv=(1, 1), masks=(None, None),
    rules=(False, False), B=1, H=1,
    H_KV=1, D=1, D_V=1, dtype="float32", scale=1.0, schedule="lv-xattn",
)  # fmt: skip
meter = Meter()
exchange = Exchange(comm, layout, np.zeros(1, np.float32), meter=meter)
rotation = exchange.rotation(
    Kind("large", BLOCKS, "queries", lambda of, rank: [Field((of.s_q[rank],), "uint8")])
)
block = np.full(SIZE, comm.rank + 1, np.uint8)
block[-1] = 77 + comm.rank
rotation.send(block, hop=0)
del block
(got,) = rotation.receive(1)
other = 1 - comm.rank
assert got.shape == (SIZE,)
assert (got[:-1:4093] == other + 1).all()
assert (got[2**31 - 1], got[2**31], got[-1]) == (other + 1, other + 1, 77 + other)
exchange.finish()
assert meter.bytes == SIZE
sys.stdout.write("right\n")
