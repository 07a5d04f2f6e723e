"""Kill one rank of ``run --output`` when the output has been made and nothing is in it.

usage: run_killed.py RANK FILE
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI

from lvxattn.cli import run
from lvxattn.mpi_impl.__main__ import main

rank, target = int(sys.argv[1]), Path(sys.argv[2])


def killed(*_: Any) -> Any:
    """End this process, or wait for the end of the other one."""
    if MPI.COMM_WORLD.rank == rank:
        assert len(list(target.parent.iterdir())) == 2
        print(f"rank {rank} has the output", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    MPI.COMM_WORLD.Barrier()


run._measure = killed
main(["run", "--text-tokens", "8", "--visual-tokens", "16", "--output", str(target)])
