"""A training run on ranks that torchrun started, told on rank 0 as JSON.

Run as ``torchrun --nproc-per-node 4 tests/programs/train.py STEPS ARGUMENTS...``: it takes
STEPS steps in float64, and then runs ``train`` with the arguments.
"""

import hashlib
import io
import json
import sys
from argparse import ArgumentParser
from contextlib import redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.train import add_options, run_training
from lvxattn.torch_impl.train.data import load_images
from lvxattn.torch_impl.train.loop import Run
from tests.test_train import SETTINGS


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group.of(None)
    run = Run.begin(SETTINGS, load_images(), group)
    for _ in range(int(sys.argv[1])):
        run.step()
    weights = b"".join(p.detach().numpy().tobytes() for p in run.model.parameters())
    parser = ArgumentParser()
    add_options(parser)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_training(parser.parse_args(sys.argv[2:]), group)
    mine = hashlib.sha256(weights).hexdigest(), status, out.getvalue(), err.getvalue()
    by_rank = group.allgather(mine)
    if group.rank == 0:
        print(json.dumps({"losses": run.curve.column("loss"), "by_rank": by_rank}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
