"""``%%mpi N``: the arguments of the magic, and what it shows."""

import re
import shlex
from argparse import ArgumentTypeError
from typing import Any

from IPython import get_ipython
from IPython.core.error import UsageError

from lvxattn.cli.arguments import Parser, positive
from lvxattn.cli.arguments import UsageError as BadArguments
from lvxattn.mpi_impl.jupyter.launch import run_cell
from lvxattn.mpi_impl.jupyter.report import CellError

_SECONDS = 60.0


def mpi(line: str, cell: str) -> None:
    """Run a cell on MPI ranks; print what each of them printed, and its last expression's value.

    The cell is plain Python, without magics.  ``plt.show()`` shows nothing there: have ``--give``
    bring a figure of rank 0 to the notebook, and show it in the next cell.  If a cell fails, what
    was printed until then is shown, and the names after ``--give`` are gone from the notebook,
    unless they are after ``--take``, too.

    Parameters
    ----------
    line : str
        ``N [--timeout SECONDS] [--take NAMES] [--give NAMES]``: how many ranks; how long they may
        take (60 s); which variables of the notebook, separated by commas, every rank is to have;
        which of rank 0's the notebook is to have afterwards.
    cell : str

    Raises
    ------
    CellError
        A rank raised or died, or the time was up: see `run_cell`.
    """
    line = re.sub(r"\s*,\s*", ",", line)
    try:
        options = _parser().parse_args(shlex.split(line, comments=True))
    except (BadArguments, ValueError) as error:
        raise UsageError(str(error).removesuffix(" (on all ranks)")) from None
    space: dict[str, Any] = get_ipython().user_ns
    take = {name: space[name] for name in options.take if name in space}
    # A check that comes next must not take old values for the results of a cell that failed.
    for name in set(options.give) - set(options.take):
        space.pop(name, None)
    missing = [name for name in options.take if name not in space]
    if missing:
        raise UsageError(f"%%mpi: --take: the notebook has no {', '.join(missing)}")
    try:
        ran = run_cell(cell, options.ranks, timeout=options.timeout, take=take, give=options.give)
    except CellError as error:
        _show(error.printed)
        raise
    _show(ran.printed)
    space.update(ran.given)


def _show(printed: list[str]) -> None:
    for rank, text in enumerate(printed):
        for row in text.splitlines():
            print(f"rank {rank} | {row}")


def _parser() -> Parser:
    parser = Parser("%%mpi", allow_abbrev=False, add_help=False)
    parser.add_argument("ranks", type=positive, metavar="N")
    parser.add_argument("--timeout", type=_seconds, default=_SECONDS)
    for name in ("--take", "--give"):
        parser.add_argument(name, type=_names, default=[])
    return parser


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    wrong = [name for name in names if not name.isidentifier()]
    if wrong or not names:
        raise ArgumentTypeError(f"expected names of variables, got {text!r}")
    return names


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds
