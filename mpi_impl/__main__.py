"""Command line: ``mpiexec -n 4 python -m mpi4py -m lvxattn.mpi_impl demo``."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from mpi4py import MPI

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


_DEMO = "lvxattn demo"


class _UsageError(ValueError):
    """The command line makes no sense."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors and help texts reach the terminal once, not once a rank."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise _UsageError(f"{self.prog}: error: {message} (on all ranks)")

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        """Print on rank 0."""
        if MPI.COMM_WORLD.rank == 0:
            super()._print_message(message, file)


def main(argv: Sequence[str] | None = None, comm: MPI.Intracomm = MPI.COMM_WORLD) -> int:
    """Run a command. Collective: every rank of comm calls this.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process unless given.
    comm : mpi4py.MPI.Intracomm

    Returns
    -------
    int
        0, or 1 if a check failed, or 2 if the input is bad; the same on all ranks.
    """
    try:
        options = _parser().parse_args(argv)
        return int(options.run(options, comm))
    except _UsageError as error:
        return _refuse(str(error), comm)


def _demo(options: argparse.Namespace, comm: MPI.Intracomm) -> int:
    try:
        from lvxattn.mpi_impl.demo import InputError, search_video  # what only the demo needs
    except ModuleNotFoundError as error:
        hint = "pip install 'lvxattn[demo]' brings all it needs"
        return _refuse(f"{_DEMO}: error: {error}; {hint} (on all ranks)", comm)
    try:
        return 0 if search_video(options, comm) else 1
    except InputError as error:
        return _refuse(f"{_DEMO}: error: {error}", comm)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "lvxattn", description="Exact distributed cross-attention over MPI.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="search a long video for small patches",
        description="Search a long video for small patches, by exact distributed cross-attention.",
        allow_abbrev=False,
    )
    source = demo.add_mutually_exclusive_group()
    source.add_argument("--video", metavar="FILE", help="search a video file")
    source.add_argument("--images", metavar="DIR", help="search the images in a folder")
    demo.add_argument(
        "--frames",
        type=_positive,
        metavar="N",
        help="frames to search, evenly spaced if there are more (default: 360)",
    )
    demo.add_argument(
        "--queries",
        type=_positive,
        default=256,
        metavar="N",
        help="patches to search for (default: 256)",
    )
    demo.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="another path, other patches"
    )
    demo.add_argument(
        "--output",
        default="demo.png",
        metavar="FILE",
        help="where to write the picture (default: demo.png)",
    )
    demo.set_defaults(run=_demo)
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
    return number


def _refuse(message: str, comm: MPI.Intracomm) -> int:
    """Say on rank 0 what is wrong with the input; return the exit status for that."""
    if comm.rank == 0:
        print(message, file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    status = main()
    # `python -m mpi4py` calls MPI_Abort if the status is not 0, unless MPI has ended by then: abort
    # is for the rank that fails alone. Here all ranks leave together.
    sys.stdout.flush()
    MPI.Finalize()
    sys.exit(status)
