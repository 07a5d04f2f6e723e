"""Changed, wrapped and sharded projections on the ranks of a process group; rank 0 prints JSON.

For each change of a module: the differences of its results with keys and values recomputed from
those with them kept, and from those of an unchanged module.
"""

import json
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lvxattn.torch_impl import CrossAttention, shard
from tests.adapters import CHANGES, PROJECTIONS, compared, inputs
from tests.programs.start import finish, start

# FSDP fears that somebody writes to what a linear layer returns.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")


def sharded_whole(module: CrossAttention) -> nn.Module:
    fully_shard(module)
    return module


def sharded_by_projection(module: CrossAttention) -> nn.Module:
    for name in (*PROJECTIONS, "out_proj"):
        fully_shard(getattr(module, name))
    return sharded_whole(module)


WRAPS: dict[str, Any] = {
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": sharded_whole,
    "fully_shard of each projection": sharded_by_projection,
}

comm, _ = start()
torch.set_num_threads(1)
mine = [shard(a, comm, axis=1) for a in inputs()]
report = {name: compared(change, *mine) for name, change in CHANGES.items()}
for name, wrap in WRAPS.items():
    report[name] = compared(CHANGES["biases"], *mine, wrap=wrap)
    report[f"{name}, LoRA"] = compared(CHANGES["LoRA"], *mine, wrap=wrap)
reports = comm.allgather(report)
if comm.rank == 0:
    json.dump(reports, sys.stdout)
finish(comm)
