"""Command line: ``mpiexec -n 4 python -m mpi4py -m lvxattn.mpi_impl COMMAND``."""

import argparse
import os
import sys
from collections.abc import Sequence

from mpi4py import MPI

from lvxattn.cli import UsageError, refuse, run_command
from lvxattn.cli.arguments import Parser, natural, positive
from lvxattn.cli.measure import add_options as add_measure_options
from lvxattn.cli.measure import run_measure
from lvxattn.cli.run_options import add_options
from lvxattn.common.launcher import mismatch, speaks
from lvxattn.common.validation import on_rank
from lvxattn.mpi_impl import kernels
from lvxattn.mpi_impl.commands.doctor import examine
from lvxattn.mpi_impl.commands.run import MPIRanks
from lvxattn.mpi_impl.commands.run.backend import Backend
from lvxattn.mpi_impl.measure import Probe
from lvxattn.mpi_impl.transport import cuda_aware as awareness
from lvxattn.mpi_impl.transport.death_notice import announce_death
from lvxattn.mpi_impl.transport.watchdog import timeout

_DEMO = "lvxattn demo"


_ENVIRONMENT = (
    "environment: LVXATTN_TIMEOUT=SECONDS ends a run in which a rank waits that long; "
    "LVXATTN_CUDA_AWARE=auto|0|1 hands MPI device memory or not; LVXATTN_KERNEL=auto|cuda|tiles "
    "chooses what attends to CuPy arrays. "
)


class _Parser(Parser):
    speaks = speaks(os.environ, MPI.COMM_WORLD.rank)


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
        _check_environment(options.command, comm)
        return int(options.run(options, comm))
    except UsageError as error:
        return refuse(str(error), 0 if speaks(os.environ, comm.rank) else 1)


def _demo(options: argparse.Namespace, comm: MPI.Intracomm) -> int:
    try:
        from lvxattn.mpi_impl.commands.demo import (  # what only the demo needs
            InputError,
            search_video,
        )
    except ModuleNotFoundError as error:
        hint = "the extra 'demo' brings all it needs"
        return refuse(f"{_DEMO}: error: {error}; {hint} (on all ranks)", comm.rank)
    try:
        return 0 if search_video(options, comm) else 1
    except InputError as error:
        return refuse(f"{_DEMO}: error: {error}", comm.rank)


def _run(options: argparse.Namespace, comm: MPI.Intracomm) -> int:
    return run_command(options, MPIRanks(comm))


def _measure(options: argparse.Namespace, comm: MPI.Intracomm) -> int:
    def probe(backend: Backend, shape: tuple[int, int, int], dtype: str) -> Probe:
        return Probe(comm, shape, dtype, backend.xp)

    return run_measure(options, MPIRanks(comm), probe)


def _doctor(_: argparse.Namespace, comm: MPI.Intracomm) -> int:
    return 0 if examine(comm) else 1


def _check_environment(command: str, comm: MPI.Intracomm) -> None:
    """Refuse a wrong launcher, which the doctor examines, and a bad variable of any rank's."""
    wrong = mismatch(os.environ, MPI.COMM_WORLD.size)
    if wrong and command != "doctor":
        raise UsageError(f"lvxattn: error: {wrong}")
    errors = [error for error in comm.allgather(_bad_variable(comm)) if error is not None]
    if errors:
        raise UsageError(f"lvxattn: error: {errors[0]}")


def _bad_variable(comm: MPI.Intracomm) -> Exception | None:
    try:
        timeout(comm)
    except ValueError as error:  # which names the rank
        return error
    try:
        awareness.wish()
        kernels.wish()
    except ValueError as error:
        return on_rank(error, comm.rank, comm.size)
    return None


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
        type=positive,
        metavar="N",
        help="frames to search, evenly spaced if there are more (default: 360)",
    )
    demo.add_argument(
        "--queries",
        type=positive,
        default=256,
        metavar="N",
        help="patches to search for (default: 256)",
    )
    demo.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="another path, other patches"
    )
    demo.add_argument(
        "--output",
        default="demo.png",
        metavar="FILE",
        help="where to write the picture (default: demo.png)",
    )
    demo.set_defaults(run=_demo)
    run = commands.add_parser(
        "run",
        help="cross-attention on random tensors or on a file's",
        description="Exact distributed cross-attention: measured, checked and reported.",
        epilog=_ENVIRONMENT + "exit status: 0; 1 if a check failed; 2 if the input is bad",
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
    add_measure_options(measure, "machine-mpi.json")
    measure.set_defaults(run=_measure)
    doctor = commands.add_parser(
        "doctor",
        help="are these ranks fit for a run?",
        description="Look at every rank, send messages round, and say what to do better.",
        epilog=_ENVIRONMENT + "exit status: 0; 1 if ranks cannot talk, or cannot compute on their "
        "GPUs; 2 if an argument or a variable is bad",
        allow_abbrev=False,
    )
    doctor.set_defaults(run=_doctor)
    return parser


if __name__ == "__main__":
    announce_death(MPI.COMM_WORLD)
    status = main()
    # `python -m mpi4py` calls MPI_Abort if the status is not 0, unless MPI has ended by then: abort
    # is for the rank that fails alone. Here all ranks leave together.
    sys.stdout.flush()
    MPI.Finalize()
    sys.exit(status)
