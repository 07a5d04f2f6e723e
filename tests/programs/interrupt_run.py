"""Run a command; the rank given, or all, gets SIGINT in the middle of it."""

import os
import runpy
import signal
import sys

from mpi4py import MPI

from lvxattn.mpi_impl.commands import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
which, sys.argv[1:] = sys.argv[1], ["run", "--text-tokens", "8", "--visual-tokens", "64"]


def interrupted(*_: object, **__: object) -> None:
    """Be interrupted."""
    os.kill(os.getpid(), signal.SIGINT)


if which in ("all", str(MPI.COMM_WORLD.rank)):
    run.Backend.forward = interrupted  # type: ignore[assignment, method-assign]
runpy.run_module("lvxattn.mpi_impl", run_name="__main__", alter_sys=True)
