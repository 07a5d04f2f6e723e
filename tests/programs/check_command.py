"""The oracle's command line on ranks, with a stand-in for what checks them.

usage: check_command.py WHAT
"""

import os
import sys
from types import SimpleNamespace
from typing import Any

from lvxattn.check.command import checking, leave, main

what = sys.argv[1]
if "RANK" in os.environ:  # torchrun's
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
else:
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


class Report(SimpleNamespace):
    """What rank 0 gets."""

    def __str__(self) -> str:
        return "the report"


def check_distributed(fn: Any, **options: Any) -> Report | None:
    """Return a report on rank 0."""
    assert callable(fn)
    assert (options["suite"], options["framework"]) == ("quick", None)
    assert options["cuts"] == ("divisible", "last")
    return Report(passed=what == "passed") if rank == 0 else None


checking.check_distributed = check_distributed  # type: ignore[assignment]
lost = rank == size - 1 and what.startswith("no module")
status = main(["nowhere:f" if lost else "numpy:dot", "--distributed", "--cuts", "divisible,last"])
sys.stdout.write(f"status {status}\n")
leave()
sys.exit(status)
