"""What one rank of a ``%%mpi`` cell runs, started by its guard through ``python -m mpi4py``.

DIR/cell.py      the cell                     DIR/take.pickle   variables that it is to have
DIR/printed.R    what rank R printed          DIR/give.pickle   variables of rank 0
DIR/raised.R     the exception of rank R      DIR/refused.R     a variable that cannot be sent
DIR/stack.R      process and main thread of rank R; where its threads are, when it is asked
DIR/done.PID     the rank that is the process PID has run the whole cell
"""

import ast
import faulthandler
import linecache
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from mpi4py import MPI

from lvxattn.mpi_impl.jupyter.report import CELL, RefusedError
from lvxattn.mpi_impl.jupyter.variables import load, store


def main(folder: Path, ranks: int, give: list[str]) -> None:
    """Run the cell.

    Parameters
    ----------
    folder : Path
    ranks : int
        How many were started.
    give : list of str
        Names of variables to be kept.
    """
    rank = MPI.COMM_WORLD.rank
    _keep_to_itself()
    _print_to(folder / f"printed.{rank}")
    _tell_when_asked(folder / f"stack.{rank}")
    # The cell's functions and classes are of __main__, where pickle looks for them.
    space = sys.modules["__main__"] = ModuleType("__main__")
    try:
        if MPI.COMM_WORLD.size != ranks:
            raise RefusedError(
                f"{ranks} ranks were started, and MPI knows of {MPI.COMM_WORLD.size}: "
                "the launcher is not that of mpi4py's MPI; see LVXATTN_MPIEXEC"
            )
        vars(space).update(load(folder / "take.pickle", "--take"))
        _run((folder / "cell.py").read_text("utf-8"), vars(space))
        if rank == 0:
            store(folder / "give.pickle", _picked(vars(space), give), "--give")
    except BaseException as error:
        name, text = (
            ("refused", str(error)) if isinstance(error, RefusedError) else ("raised", _told(error))
        )
        (folder / f"{name}.{rank}").write_text(text, "utf-8", "backslashreplace")
        os._exit(1)  # the launcher ends all ranks: now, and not after this one's threads
    (folder / f"done.{os.getpid()}").touch()


def _keep_to_itself() -> None:
    """Have what this process starts inherit none of its descriptors, but the standard ones.

    Among them are the launcher's pipes: it waits for as long as anybody has one.
    """
    with suppress(FileNotFoundError):  # there is no /proc
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:
                with suppress(OSError):  # that of the listing itself
                    os.set_inheritable(number, False)


def _print_to(path: Path) -> None:
    """Send what this process prints to a file, and what it starts, too."""
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _tell_when_asked(path: Path) -> None:
    """On SIGUSR1, and on a crash, write down where all threads are."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # never closed
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    os.write(file, f"{os.getpid()} {threading.get_ident():x}\n".encode())


def _run(source: str, space: dict[str, Any]) -> None:
    """Run the cell, and show the value of its last expression, as a notebook does."""
    # Tracebacks and warnings look here for the lines of a file that does not exist.
    linecache.cache[CELL] = (len(source), None, source.splitlines(keepends=True), CELL)
    tree = ast.parse(source, CELL)
    quiet = source.rstrip().endswith(";")
    last = [node for node in tree.body[-1:] if isinstance(node, ast.Expr) and not quiet]
    first = ast.Module(tree.body[: len(tree.body) - len(last)], tree.type_ignores)
    try:
        exec(compile(first, CELL, "exec"), space)
        exec(compile(ast.Interactive(list[ast.stmt](last)), CELL, "single"), space)
    except SystemExit as left:
        if left.code:
            raise


def _picked(space: dict[str, Any], give: list[str]) -> dict[str, Any]:
    if missing := [name for name in give if name not in space]:
        raise RefusedError(f"--give: rank 0 has no {', '.join(missing)}")
    return {name: space[name] for name in give}


def _told(error: BaseException) -> str:
    """Return the traceback, from the cell on."""
    told = traceback.TracebackException.from_exception(error)
    frames = [n for n, frame in enumerate(told.stack) if frame.filename == CELL]
    if not frames:
        return "".join(told.format_exception_only())
    told.stack = traceback.StackSummary.from_list(told.stack[frames[0] :])
    return "".join(told.format())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
