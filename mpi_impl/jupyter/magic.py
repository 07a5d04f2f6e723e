"""``%%mpi N``: the magic's arguments and output."""

import re
import shlex
from argparse import ArgumentTypeError
from math import inf
from typing import Any

from IPython import get_ipython
from IPython.core.error import UsageError

from lvxattn.cli.arguments import Parser, between, positive
from lvxattn.cli.arguments import UsageError as BadArguments
from lvxattn.mpi_impl.jupyter.cell_files import CellError
from lvxattn.mpi_impl.jupyter.launch import run_cell

_SECONDS = 60.0


def mpi(line: str, cell: str) -> None:
    """Run a cell on MPI ranks; print each rank's output and the value of its last expression.

    The cell is plain Python, without magics.  ``plt.show()`` shows nothing there: bring a figure of
    rank 0 to the notebook with ``--give``, and show it in the next cell.  If a cell fails, its
    output until then is shown, and the names in ``--give`` are removed from the notebook, unless
    they are in ``--take``, too.

    Parameters
    ----------
    line : str
        ``N [--timeout SECONDS] [--take NAMES] [--give NAMES]``: number of ranks; time limit
        (default: 60 s); variables of the notebook for every rank, separated by commas; variables of
        rank 0 for the notebook.
    cell : str

    Raises
    ------
    CellError
        A rank raised or died, or the time limit was reached: see `run_cell`.
    """
    line = re.sub(r"\s*,\s*", ",", line)
    try:
        options = _parser().parse_args(shlex.split(line, comments=True))
    except (BadArguments, ValueError) as error:
        raise UsageError(str(error).removesuffix(" (on all ranks)")) from None
    space: dict[str, Any] = get_ipython().user_ns
    take = {name: space[name] for name in options.take if name in space}
    # A cell that fails must not leave old values under the names of its results.
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
    parser.add_argument("--timeout", type=between(0, inf, "seconds above 0"), default=_SECONDS)
    for name in ("--take", "--give"):
        parser.add_argument(name, type=_names, default=[])
    return parser


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    wrong = [name for name in names if not name.isidentifier()]
    if wrong or not names:
        raise ArgumentTypeError(f"expected names of variables, got {text!r}")
    return names
