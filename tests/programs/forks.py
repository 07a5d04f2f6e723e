"""Run programs on ranks that are forks of this process, in which PyTorch is imported once for all.

Reads a request from each line of its input, as JSON, and answers with a line: the exit status of
every rank, None for one that was killed because the time was up.  With the input it ends.

program   what follows ``python``: a file, or "-m" and a module, and the arguments
ranks     each rank's environment, all of it
cwd       where they run
folder    where rank N's output goes: to ``outN`` and ``errN``
timeout   seconds
together  whether all end when one has failed, as torchrun has it
"""

import gc
import json
import math
import os
import runpy
import sys
from typing import Any

import ml_dtypes  # noqa: F401 - what follows is imported for the ranks
import torch
import torch._dynamo
import torch.distributed.device_mesh
import torch.fx.experimental.symbolic_shapes
import torch.profiler

import lvxattn.torch_impl.commands.run  # noqa: F401
from lvxattn.common.processes import end_with_parent
from tutorials.torch_cell import ends

# Seconds that the others have when one has failed.
GRACE = 3.0


def serve() -> dict[str, Any] | None:
    """Answer requests until there are no more; in a rank, return what it is to do."""
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        parent = os.getpid()
        for rank, env in enumerate(request["ranks"]):
            if not (pid := os.fork()):
                end_with_parent(parent)
                return {**request, "rank": rank, "env": env}
            pids.append(pid)
        grace = GRACE if request["together"] else math.inf
        print(json.dumps(ends(pids, request["timeout"], grace)), flush=True)
    return None


def run(what: dict[str, Any]) -> None:
    """Be a rank: run the program as ``python`` does."""
    files = "/dev/null", *(f"{what['folder']}/{name}{what['rank']}" for name in ("out", "err"))
    for fd, name in enumerate(files):
        os.dup2(os.open(name, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT), fd)
    os.environ.clear()
    os.environ.update(what["env"])
    os.chdir(what["cwd"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    first, *rest = what["program"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, what["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = what["program"]
        sys.path[0] = os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    end_with_parent(os.getppid())
    gc.freeze()  # else every rank, as it ends, would take a second to collect PyTorch's modules
    # At top level, with nothing to be caught: what is raised ends a rank as it would any process.
    if mine := serve():
        run(mine)
