"""A training run of Mllama on torchrun's ranks; rank 0 prints the results as JSON.

Run as ``torchrun --nproc-per-node 3 tests/programs/train_llama3v.py STEPS ARGUMENTS...``: it takes
STEPS steps, all of it in float64, and then runs ``train`` with the arguments.
"""

import json
import sys

import torch
import torch.distributed as dist

from lvxattn.torch_impl.commands.train import training
from lvxattn.torch_impl.commands.train.data import load_images
from lvxattn.torch_impl.commands.train.training import Run
from lvxattn.torch_impl.group import Group
from tests.programs.train import train
from tests.test_train import LLAMA, make_exact


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group.of(None)
    training.make_model = make_exact
    run = Run.begin(LLAMA, load_images(), group)
    for _ in range(int(sys.argv[1])):
        run.step()
    by_rank = group.allgather(train(sys.argv[2:], group))
    if group.rank == 0:
        curve = {name: run.curve.column(name) for name in ("loss", "accuracy")}
        print(json.dumps(curve | {"by_rank": by_rank}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
