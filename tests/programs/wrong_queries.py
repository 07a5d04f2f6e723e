"""Give rank 1 other numbers of queries than the others, or a rule.

    wrong_queries.py SCHEDULE DIFFERENCE        or "replicated", or "rule", for a schedule

A rank that gets results says so.
"""

import os
import sys
from datetime import timedelta
from typing import Any

import numpy as np

from lvxattn.reference import Causal
from tests.programs.start import OnArrays

implementation: Any
if "RANK" in os.environ:
    import torch.distributed as dist

    from lvxattn.torch_impl.group import Group

    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    comm, implementation = Group.of(None), OnArrays()
else:
    from mpi4py import MPI

    from lvxattn import mpi_impl as implementation

    comm = MPI.COMM_WORLD
way, difference = sys.argv[1], int(sys.argv[2])
whole, other = way == "replicated", comm.rank == 1
options = {"queries": "replicated"} if whole else {} if way == "rule" else {"schedule": way}
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((comm.size, 1, 2, 6, 8)) for _ in range(3))
mine = q[comm.rank], k[comm.rank], v[comm.rank]
layout = implementation.Layout.agree(*mine, comm, **options)
lengths = [3, 1, *[2] * (comm.size - 2)]
if whole:
    rows = lengths[0] + (difference if other else 0)
    layout = layout.with_queries(rows, comm)
else:
    rows = lengths[comm.rank]
    lengths[0] += difference if other else 0
    rule = Causal() if way == "rule" and other else None
    layout = layout.with_queries(lengths, comm, rule=rule)
given = q[0 if whole else comm.rank][:, :, :rows]
options.pop("schedule", None)
implementation.cross_attention(given, *mine[1:], comm, layout=layout, **options)
print("results", flush=True)
