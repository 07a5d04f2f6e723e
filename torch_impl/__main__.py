"""Command line: ``torchrun --nproc-per-node 4 -m lvxattn.torch_impl COMMAND``.

Without torchrun it is one rank, and its exit status is the command's.  torchrun's own is 0 or 1: on
any other status of a rank it exits with 1, and reports the ranks' status on stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from lvxattn.cli import UsageError, refuse, run_command
from lvxattn.cli.arguments import Parser, adder, check_same_line
from lvxattn.cli.measure import add_measure, run_measure
from lvxattn.cli.run_options import add_run
from lvxattn.torch_impl.commands import doctor
from lvxattn.torch_impl.commands import model as whole_model
from lvxattn.torch_impl.commands.processes import check_environment, world
from lvxattn.torch_impl.commands.run import Backend, TorchRanks
from lvxattn.torch_impl.commands.train import add_options, run_training
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.measure import Probe


class _Parser(Parser):
    speaks = os.environ.get("RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.  Collective: every rank of the program calls this.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments (default: the process's own).

    Returns
    -------
    int
        0, or 1 if a check failed, or 2 if the input is bad; the same on all ranks.
    """
    line = sys.argv[1:] if argv is None else list(argv)
    # It is to find out whether ranks reach one another, before a group of them is made.
    before = (doctor.meet, doctor.WAIT) if line[:1] == ["doctor"] else ()
    try:
        with world(*before) as group:
            try:
                check_environment(group)
                check_same_line(group.allgather(line))
                options = _parser().parse_args(line)
                return int(options.run(options, group))
            except UsageError as error:
                return refuse(str(error), group.rank)
    except doctor.UnreachableError:
        return 1


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
    add = adder(parser)
    add_run(add, lambda options, group: run_command(options, TorchRanks(group)))
    add_measure(add, _measure, "machine-torch.json")
    train = add(
        "train",
        run_training,
        help="train a small model to find the needle in a long video",
        description="Train a small model to read a digit in a long video of real handwriting.",
    )
    add_options(train)
    model = add(
        "model",
        whole_model.run_model,
        help="a whole multimodal model, spread over the ranks",
        description="Run a multimodal model whose visual input is spread over the ranks.",
    )
    whole_model.add_options(model)
    add(
        "doctor",
        lambda _, group: doctor.run_doctor(group),
        help="check that these ranks are fit for a run",
        description="Examine every rank, send messages around the ring, and give advice.",
        epilog="environment: LVXATTN_TIMEOUT=SECONDS limits each wait for other ranks (default: "
        "30); a connection between hosts is tried for 6 seconds. exit status: "
        "0; 1 if ranks cannot communicate, or cannot compute on their GPUs",
    )
    return parser


if __name__ == "__main__":
    # An exception on one rank becomes part of torchrun's report.
    status = record(main)()
    print(end="", flush=True)
    # Not by Python's own end: a thread of PyTorch's that still runs then may abort the process, and
    # torchrun would report a rank whose work is done.
    os._exit(status or 0)
