"""Attend, forward and backward; one rank stops itself as it begins a block.

usage: stop_rank.py SCHEDULE RANK WHERE N

WHERE is agree, forward or backward; N is the block's number.
"""

import os
import signal
import sys
from importlib import import_module
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl

schedule, where = sys.argv[1], sys.argv[3]
rank, block = int(sys.argv[2]), int(sys.argv[4])
comm = MPI.COMM_WORLD
module = import_module(
    f"lvxattn.mpi_impl.{schedule.replace('-', '_').replace('ring', 'ring_attention')}"
)
name = {"forward": "partial_attention", "backward": "block_attention_backward"}.get(where)
pids = comm.gather(os.getpid())
if pids is not None:
    print(*pids, flush=True)
comm.Barrier()


def stopping(inner: Any) -> Any:
    """Return `inner`, which stops this process at its `block`-th call."""
    left = [block]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGSTOP)
        left[0] -= 1
        return inner(*args, **kwargs)

    return call


if comm.rank == rank:
    if name is None:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        setattr(module, name, stopping(getattr(module, name)))
x = np.ones((1, 2, 9, 8), np.float32)
out, lse = mpi_impl.cross_attention(x, x, x, comm, schedule=schedule)
mpi_impl.cross_attention_backward(x, x, x, x, out, lse, comm, schedule=schedule)
