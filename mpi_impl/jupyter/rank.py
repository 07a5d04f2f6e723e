"""What one rank of a ``%%mpi`` cell runs, through ``python -m mpi4py``.

    DIR/cell.py      the cell                     DIR/take.pickle   variables that it is to have
    DIR/printed.R    what rank R printed          DIR/stack.R       where rank R was at the limit
    DIR/raised.R     the exception of rank R      DIR/give.pickle   variables of rank 0

An exception goes on to mpi4py, which ends all ranks.
"""

import faulthandler
import os
import pickle
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpi4py import MPI

CELL = "cell.py"


def main(folder: Path, deadline: float, give: list[str]) -> None:
    """Run the cell.

    Parameters
    ----------
    folder : Path
    deadline : float
        When it is written down where the rank is; as `time.time` counts.
    give : list of str
        Names of variables to be kept.
    """
    rank = MPI.COMM_WORLD.rank
    space: dict[str, Any] = {"__name__": "__main__"}
    space |= pickle.loads((folder / "take.pickle").read_bytes())
    source = (folder / CELL).read_text()
    with _watched(folder, rank, deadline), _printing_to(folder / f"printed.{rank}"):
        try:
            exec(compile(source, str(folder / CELL), "exec"), space)
            if rank == 0:
                (folder / "give.pickle").write_bytes(pickle.dumps(_picked(space, give)))
        except BaseException as error:
            (folder / f"raised.{rank}").write_text(_told(error, folder))
            raise


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Send what this process prints to a file, and what it starts, too.

    The launcher's pipe is left to the launcher: it waits for as long as anybody has it.
    """
    before = [os.dup(number) for number in (1, 2)]
    with open(path, "w", buffering=1) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        try:
            yield
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            for number, old in zip((1, 2), before, strict=True):
                os.dup2(old, number)
                os.close(old)


@contextmanager
def _watched(folder: Path, rank: int, deadline: float) -> Iterator[None]:
    with open(folder / f"stack.{rank}", "w") as file:
        # It wants seconds above 0.
        faulthandler.dump_traceback_later(max(1e-3, deadline - time.time()), file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _picked(space: dict[str, Any], give: list[str]) -> dict[str, Any]:
    missing = [name for name in give if name not in space]
    if missing:
        raise NameError(f"--give: rank 0 has no {', '.join(missing)}")
    return {name: space[name] for name in give}


def _told(error: BaseException, folder: Path) -> str:
    """Return the traceback, from the cell on."""
    told = traceback.TracebackException.from_exception(error)
    frames = [n for n, frame in enumerate(told.stack) if frame.filename == str(folder / CELL)]
    if frames:
        told.stack = traceback.StackSummary.from_list(told.stack[frames[0] :])
    return "".join(told.format()).replace(str(folder / CELL), "cell")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
