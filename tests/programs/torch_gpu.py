"""Solve problems on ranks that share a GPU, or have one each; rank 0 says in JSON what is right.

usage: torch_gpu.py gloo|nccl cuda|cpu

With gloo blocks are staged through the host's memory; with nccl each rank takes a GPU of its own.
"""

import json
import os
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from lvxattn.torch_impl.group import Group
from tests.cases import CASES, Case
from tests.judge import solve, worst_ratios
from tests.programs import start

SCHEDULES = ("lv-xattn", "ring", "grid", "gather", "ulysses", "replicated")
WIDE = Case("64 wide", B=2, H=4, H_KV=4, S_Q=40, S_KV=1100, D=64, D_V=64, cut="ragged")
HALF = [
    replace(WIDE, name=f"{WIDE.name}, {dtype}", dtype=dtype) for dtype in ("bfloat16", "float16")
]

backend, kind = sys.argv[1:]
rank, size = (int(os.environ[f"LVXATTN_TEST_{name}"]) for name in ("RANK", "SIZE"))
device = torch.device("cpu")
if kind == "cpu":  # to see without a GPU that this runs
    HALF, SCHEDULES, CASES = HALF[:1], SCHEDULES[:1], CASES[:1]
if kind == "cuda":
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
dist.init_process_group(
    "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
    init_method=f"file://{os.environ['LVXATTN_TEST_STORE']}",
    rank=rank,
    world_size=size,
    timeout=timedelta(seconds=60),
)
# The implementation in NumPy's clothes, with a device beneath.
host_tensor, host_array = start.tensor, start.array


def to_device(x: object) -> object:
    x = host_tensor(x)
    return x.to(device) if isinstance(x, torch.Tensor) else x


start.tensor, start.array = to_device, lambda x: host_array(x.cpu())
comm, implementation = Group.of(None), start.OnArrays()
report = {}
for schedule in SCHEDULES:
    for case in HALF if schedule != "lv-xattn" else [*HALF, *CASES[::6]]:
        problem = case.on(schedule, size).make()
        for again in (False, True):
            results = solve(problem, comm, implementation, schedule=schedule, reuse_layout=again)
            right = max(worst_ratios(problem, results).values()) <= 1
            name = f"{case.name}, {schedule}, {'a layout' if again else 'no layout'}"
            report[name] = right
reports = comm.allgather(report)
if rank == 0:
    json.dump({"ranks": reports, "devices": torch.cuda.device_count()}, sys.stdout)
start.finish(comm)
