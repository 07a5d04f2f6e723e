"""Command line: ``mpiexec -n 4 python -m mpi4py -m lvxattn.mpi_impl COMMAND``."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from mpi4py import MPI

from lvxattn.cli import InputError, UsageError, refuse, run_command
from lvxattn.cli.arguments import Parser, adder, check_same_line, natural, positive
from lvxattn.cli.measure import add_measure, run_measure
from lvxattn.cli.run_options import add_run
from lvxattn.common.launcher import mismatch, speaks
from lvxattn.common.shared_memory import unlink_own_file
from lvxattn.common.validation import on_rank
from lvxattn.mpi_impl import kernels
from lvxattn.mpi_impl.commands.doctor import DoctorRanks, run_doctor
from lvxattn.mpi_impl.commands.run import Backend, MPIRanks
from lvxattn.mpi_impl.measure import Probe
from lvxattn.mpi_impl.transport import cuda_aware
from lvxattn.mpi_impl.transport.death_notice import announce_death, end_unannounced
from lvxattn.mpi_impl.transport.watchdog import timeout

_DEMO = "lvxattn demo"
_ENVIRONMENT = (
    "environment: LVXATTN_TIMEOUT=SECONDS ends a run in which a rank waits that long; "
    "LVXATTN_CUDA_AWARE=auto|0|1 passes device memory to MPI or not; LVXATTN_KERNEL=auto|cuda|tiles"
    " selects the kernel for CuPy arrays. "
)


class _Parser(Parser):
    speaks = speaks(os.environ, MPI.COMM_WORLD.rank)


def main(argv: Sequence[str] | None = None, comm: MPI.Intracomm = MPI.COMM_WORLD) -> int:
    """Run a command. Collective: every rank of comm calls this.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments (default: the process's own).
    comm : mpi4py.MPI.Intracomm

    Returns
    -------
    int
        0, or 1 if a check failed, or 2 if the input is bad; the same on all ranks.
    """
    try:
        line = sys.argv[1:] if argv is None else list(argv)
        wrong = _bad_variable(comm)
        # Waits are limited by a variable that must be right.
        gather = MPIRanks(comm).allgather if wrong is None else comm.allgather
        if line[:1] == ["doctor"]:  # which is to find out whether messages arrive at all
            doctor = DoctorRanks(comm)
            doctor.meet(limited=wrong is None)
            gather = doctor.allgather if wrong is None else gather
        lines, errors = zip(*gather((line, wrong)), strict=True)
        check_same_line(lines)
        options = _parser().parse_args(line)
        _check_environment(options.command, errors)
        return int(options.run(options, comm))
    except UsageError as error:
        return refuse(str(error), 0 if speaks(os.environ, comm.rank) else 1)


def _demo(options: argparse.Namespace, comm: MPI.Intracomm) -> int:
    try:
        # Here, as other commands do without what it imports.
        from lvxattn.mpi_impl.commands.demo import search_video
    except ModuleNotFoundError as error:
        hint = "the extra 'demo' brings all it needs"
        return refuse(f"{_DEMO}: error: {error}; {hint} (on all ranks)", comm.rank)
    try:
        return 0 if search_video(options, comm) else 1
    except InputError as error:
        return refuse(f"{_DEMO}: error: {error}", comm.rank)


def _measure(options: argparse.Namespace, comm: MPI.Intracomm) -> int:
    def probe(backend: Backend, shape: tuple[int, int, int], dtype: str) -> Probe:
        return Probe(comm, shape, dtype, backend.xp)

    return run_measure(options, MPIRanks(comm), probe)


def _check_environment(command: str, errors: Sequence[Exception | None]) -> None:
    """Reject a bad variable of any rank and, except for the doctor, a wrong launcher."""
    wrong = mismatch(os.environ, MPI.COMM_WORLD.size)
    if wrong and command != "doctor":
        raise UsageError(f"lvxattn: error: {wrong}")
    for error in errors:
        if error is not None:
            raise UsageError(f"lvxattn: error: {error}")


def _bad_variable(comm: MPI.Intracomm) -> Exception | None:
    try:
        timeout(comm)
    except ValueError as error:  # which names the rank
        return error
    try:
        cuda_aware.wish()
        kernels.wish()
    except ValueError as error:
        return on_rank(error, comm.rank, comm.size)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "lvxattn", description="Exact distributed cross-attention over MPI.", allow_abbrev=False
    )
    add = adder(parser)
    demo = add(
        "demo",
        _demo,
        help="search a long video for small patches",
        description="Search a long video for small patches, by exact distributed cross-attention.",
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
        "--seed", type=natural, default=0, metavar="N", help="selects the camera's path and patches"
    )
    demo.add_argument(
        "--output",
        default="demo.png",
        metavar="FILE",
        help="where to write the picture (default: demo.png)",
    )
    run_epilog = _ENVIRONMENT + "exit status: 0; 1 if a check failed; 2 if the input is bad"
    add_run(add, lambda options, comm: run_command(options, MPIRanks(comm)), run_epilog)
    add_measure(add, _measure, "machine-mpi.json")
    add(
        "doctor",
        lambda _, comm: run_doctor(comm),
        help="check that these ranks are fit for a run",
        description="Examine every rank, send messages around the ring, and give advice.",
        epilog=_ENVIRONMENT + "exit status: 0; 1 if ranks cannot communicate, or cannot compute on "
        "their GPUs; 2 if an argument or a variable is bad",
    )
    return parser


if __name__ == "__main__":
    announce_death(MPI.COMM_WORLD)
    unlink_own_file()
    try:
        status = main()
    except KeyboardInterrupt:  # of all ranks, as launchers pass it on, or of one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_unannounced()
        os.write(2, f"lvxattn: interrupted on rank {MPI.COMM_WORLD.rank}\n".encode())
        time.sleep(1)  # launchers may not wait for the output of ranks that they end
        MPI.COMM_WORLD.Abort(128 + signal.SIGINT)
        os._exit(128 + signal.SIGINT)  # Abort may return before the launcher ends this rank
    # `python -m mpi4py` calls MPI_Abort if the status is not 0, unless MPI has ended by then: abort
    # is for the rank that fails alone. Here all ranks leave together.
    sys.stdout.flush()
    MPI.Finalize()
    sys.exit(status)
