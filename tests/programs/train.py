"""A training run on torchrun's ranks; rank 0 prints the results as JSON.

Run as ``torchrun --nproc-per-node 4 tests/programs/train.py STEPS ARGUMENTS...``: it takes
STEPS steps in float64, three with every other schedule, and then runs ``train`` with the arguments;
and once more on three of the ranks, which Ulysses cannot serve.
"""

import hashlib
import io
import json
import sys
from argparse import ArgumentParser
from contextlib import redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

from lvxattn.common.handshake import AUTO, SCHEDULES
from lvxattn.torch_impl.commands.train import add_options, run_training
from lvxattn.torch_impl.commands.train.data import load_images
from lvxattn.torch_impl.commands.train.training import Run
from lvxattn.torch_impl.group import Group
from tests.test_train import SETTINGS


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group.of(None)
    run = Run.begin(SETTINGS, load_images(), group)
    for _ in range(int(sys.argv[1])):
        run.step()
    weights = b"".join(p.detach().numpy().tobytes() for p in run.model.parameters())
    other_ways = {schedule: losses_by(schedule, run) for schedule in (*SCHEDULES[1:], AUTO)}
    said = train(sys.argv[2:], group)
    by_rank = group.allgather((hashlib.sha256(weights).hexdigest(), *said))
    three = dist.new_group([0, 1, 2])
    refused = None
    if group.rank < 3:
        refused = train([*sys.argv[2:], "--schedule", "ulysses"], Group.of(three))
    refusals = group.allgather(refused)
    if group.rank == 0:
        told = {"losses": run.curve.column("loss"), "by_rank": by_rank, "refusals": refusals}
        print(json.dumps(told | {"other ways": other_ways}))
    dist.barrier()
    dist.destroy_process_group()


def losses_by(schedule: str, other: Run) -> list[float]:
    """Return the losses of the first steps of the same run with another schedule."""
    run = Run.begin(SETTINGS, other.parts, other.model.group, schedule)
    for _ in range(3):
        run.step()
    return list(run.curve.column("loss"))


def train(words: list[str], group: Group) -> tuple[int, str, str]:
    """Return the exit status and the output of a training run."""
    parser = ArgumentParser()
    add_options(parser)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_training(parser.parse_args(words), group)
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    main()
