"""The program of one rank of a ``%%mpi`` cell, started by its guard with ``python -m mpi4py``.

DIR/cell.py      the cell                     DIR/take.pickle   variables for every rank
DIR/printed.R    output of rank R             DIR/give.pickle   variables of rank 0
DIR/raised.R     the exception of rank R      DIR/refused.R     a variable that cannot be sent
DIR/stack.R      process and main thread of rank R; the stacks of its threads, on request
DIR/done.PID     the rank whose process is PID has run the whole cell
DIR/orphan.R     where rank R was when its guard ended before it, which ends the rank
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

from lvxattn.common.processes import end_with_parent
from lvxattn.common.shared_memory import unlink_own_file
from lvxattn.mpi_impl.jupyter.cell_files import CELL, RefusedError, load, store
from lvxattn.mpi_impl.jupyter.guard import GUARD


def main(folder: Path, ranks: int, give: list[str]) -> None:
    """Run the cell.

    Parameters
    ----------
    folder : Path
    ranks : int
        Number of ranks started.
    give : list of str
        Names of variables to store.
    """
    rank = MPI.COMM_WORLD.rank
    _close_on_exec()
    _print_to(folder / f"printed.{rank}")
    _write_stacks_to(folder / f"stack.{rank}")
    _end_with_guard(folder / f"orphan.{rank}")
    unlink_own_file()
    # pickle looks for the cell's functions and classes in __main__.
    space = sys.modules["__main__"] = ModuleType("__main__")
    try:
        if MPI.COMM_WORLD.size != ranks:
            raise RefusedError(
                f"{ranks} ranks were started, but MPI sees {MPI.COMM_WORLD.size}: "
                "the launcher does not belong to mpi4py's MPI; see LVXATTN_MPIEXEC"
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
        os._exit(1)  # so that the launcher ends all ranks now, not after this one's threads
    (folder / f"done.{os.getpid()}").touch()


def _close_on_exec() -> None:
    """Let child processes inherit standard descriptors only.

    The others include the launcher's pipes: it waits as long as any process holds one.
    """
    with suppress(FileNotFoundError):  # there is no /proc
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:
                with suppress(OSError):  # the descriptor of the listing itself
                    os.set_inheritable(number, False)


def _print_to(path: Path) -> None:
    """Redirect the output of this process and its children to a file."""
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _write_stacks_to(path: Path) -> None:
    """Write the stacks of all threads to a file on SIGUSR1, and on a crash."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # never closed
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    os.write(file, f"{os.getpid()} {threading.get_ident():x}\n".encode())


def _end_with_guard(path: Path) -> None:
    """If the guard ends before this process, write the stack to a file, and end."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)  # never closed
    # A signal that cannot be caught could leave no word; this one is handled even in a loop in C.
    faulthandler.register(signal.SIGUSR2, file, all_threads=False, chain=True)
    end_with_parent(int(os.environ[GUARD]), signal.SIGUSR2)


def _run(source: str, space: dict[str, Any]) -> None:
    """Run the cell, and print the value of its last expression, as a notebook does."""
    # Tracebacks and warnings read the lines of a file that does not exist from here.
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
    """Return the traceback, starting in the cell."""
    told = traceback.TracebackException.from_exception(error)
    frames = [n for n, frame in enumerate(told.stack) if frame.filename == CELL]
    if not frames:
        return "".join(told.format_exception_only())
    told.stack = traceback.StackSummary.from_list(told.stack[frames[0] :])
    return "".join(told.format())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
