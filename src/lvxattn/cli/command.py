"""The command ``run``: its exit status, and what is said of an error."""

import sys
from argparse import Namespace

from lvxattn.cli.arguments import UsageError
from lvxattn.cli.options import contradiction
from lvxattn.cli.program import run_problem
from lvxattn.cli.ranks import Ranks
from lvxattn.cli.tensors import InputError

_NAME = "lvxattn run"


def run_command(options: Namespace, ranks: Ranks) -> int:
    """Run what the command line asks for.  Collective: every rank calls this.

    Parameters
    ----------
    options : argparse.Namespace
        As `options.add_options` defines them.
    ranks : Ranks

    Returns
    -------
    int
        0, or 1 if a check failed, or 2 if the input is bad; the same on all ranks.

    Raises
    ------
    UsageError
        The arguments do not go together; the same on all ranks.
    """
    wrong = contradiction(options)
    if wrong:
        raise UsageError(f"{_NAME}: error: {wrong} (on all ranks)")
    try:
        passed = run_problem(options, ranks)
    except InputError as error:
        return refuse(f"{_NAME}: error: {error}", ranks.rank)
    if not passed and ranks.rank == 0:
        print(f"{_NAME}: a check failed", file=sys.stderr, flush=True)
    return 0 if passed else 1


def refuse(message: str, rank: int) -> int:
    """Say on rank 0 what is wrong with the input.  Not collective.

    Parameters
    ----------
    message : str
    rank : int
        This rank.

    Returns
    -------
    int
        The exit status for that, 2.
    """
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    return 2
