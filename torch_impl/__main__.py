"""Command line: ``torchrun --nproc-per-node 4 -m lvxattn.torch_impl COMMAND``.

Without torchrun it is one rank, and its exit status is the command's.  torchrun's own is 0 or 1: it
ends with 1, and a report on stderr that names the ranks' status, whatever that was.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from lvxattn.cli import UsageError, refuse, run_command
from lvxattn.cli.arguments import Parser
from lvxattn.cli.measure import add_options as add_measure_options
from lvxattn.cli.measure import run_measure
from lvxattn.cli.run_options import add_options
from lvxattn.torch_impl.commands.run import TorchRanks, check_environment, world
from lvxattn.torch_impl.commands.run.backend import Backend
from lvxattn.torch_impl.commands.train import add_options as add_train_options
from lvxattn.torch_impl.commands.train import run_training
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.measure import Probe


class _Parser(Parser):
    speaks = os.environ.get("RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.  Collective: every rank of the program calls this.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process unless given.

    Returns
    -------
    int
        0, or 1 if a check failed, or 2 if the input is bad; the same on all ranks.
    """
    with world() as group:
        try:
            check_environment(group)
            options = _parser().parse_args(argv)
            return int(options.run(options, group))
        except UsageError as error:
            return refuse(str(error), group.rank)


def _run(options: argparse.Namespace, group: Group) -> int:
    return run_command(options, TorchRanks(group))


def _measure(options: argparse.Namespace, group: Group) -> int:
    def probe(backend: Backend, shape: tuple[int, int, int], dtype: str) -> Probe:
        return Probe(backend.group, shape, dtype, backend.where)

    return run_measure(options, TorchRanks(group), probe)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "lvxattn",
        description="Exact distributed cross-attention in PyTorch.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="cross-attention on random tensors or on a file's",
        description="Exact distributed cross-attention: measured, checked and reported.",
        allow_abbrev=False,
    )
    add_options(run)
    run.set_defaults(run=_run)
    measure = commands.add_parser(
        "measure",
        help="how fast is this machine?",
        description="Measure what the choice of a schedule rests on, within 10 seconds.",
        allow_abbrev=False,
    )
    add_measure_options(measure, "machine-torch.json")
    measure.set_defaults(run=_measure)
    train = commands.add_parser(
        "train",
        help="teach a small model to find the needle in a long video",
        description="Train a small model to read a digit in a long video of real handwriting.",
        allow_abbrev=False,
    )
    add_train_options(train)
    train.set_defaults(run=run_training)
    return parser


if __name__ == "__main__":
    # What is raised on one rank becomes part of torchrun's report.
    sys.exit(record(main)())
