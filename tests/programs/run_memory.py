"""Print, as JSON, what passes allocated at most on each rank, and what was predicted at least."""

import json
import sys
import tracemalloc

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.plan import call_memory

comm = MPI.COMM_WORLD
rng = np.random.default_rng(comm.rank)
# Much longer than the pieces that a pass works on.
SIZES = {
    "short text": (64 + comm.rank, 4000),
    "long text": (4000, 64 + comm.rank),
    "keys of one rank": (64, 0 if comm.rank else 4000),
}
found = []
for schedule in sys.argv[1:]:
    for name, (s_q, s_kv) in SIZES.items():
        q, k, v, dout = (
            rng.standard_normal((1, heads, rows, 16), np.float32)
            for heads, rows in ((12, s_q), (6, s_kv), (6, s_kv), (12, s_q))
        )
        layout = mpi_impl.Layout.agree(q, k, v, comm, schedule=schedule)
        given, kept = {"schedule": schedule, "layout": layout}, []
        for backward in (False, True):
            tracemalloc.start()
            if backward:
                mpi_impl.cross_attention_backward(dout, q, k, v, *kept, comm, **given)
            else:
                kept = mpi_impl.cross_attention(q, k, v, comm, **given)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            need = call_memory(layout, backward=backward)[comm.rank]
            found.append([f"{schedule}, {name}, backward: {backward}", need, peak])
gathered = comm.gather(found)
if comm.rank == 0:
    print(json.dumps(gathered))
