"""Start the ranks of a cell, wait for them, and leave none behind."""

import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lvxattn.mpi_impl.device import BLAS_VARIABLES

# All processes of a cell inherit it: ranks may have left the launcher's session.
_MARK = "LVXATTN_CELL"
# Seconds for all ranks to write down where they are.
_GRACE = 1.0
# Seconds for killed processes to be gone.
_GONE = 5.0


class CellError(RuntimeError):
    """A cell's ranks did not end well."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: what went wrong on the ranks, not how that was found."""
        return [f"CellError: {self}"]


class Ran(NamedTuple):
    """What came of a cell.

    Attributes
    ----------
    printed : list of str
        By rank.
    given : dict
        Variables of rank 0.
    """

    printed: list[str]
    given: dict[str, Any]


def run_cell(
    source: str,
    ranks: int,
    *,
    timeout: float = 60.0,
    take: dict[str, Any] | None = None,
    give: list[str] | None = None,
) -> Ran:
    """Run Python source on MPI ranks of their own.  Not collective.

    Parameters
    ----------
    source : str
    ranks : int
    timeout : float
        Seconds; ranks that take longer are ended, with all that they started.
    take : dict, optional
        Variables that every rank is to have; they are pickled.
    give : list of str, optional
        Names of variables of rank 0 that are to be returned; they are pickled.

    Returns
    -------
    Ran

    Raises
    ------
    CellError
        A rank raised: its traceback, once, whoever else raised the same.  Or the time was up: the
        line at which each rank was.  Or there is no launcher.
    """
    with tempfile.TemporaryDirectory(prefix="lvxattn-cell-") as name:
        folder = Path(name)
        (folder / "cell.py").write_text(source)
        (folder / "take.pickle").write_bytes(_pickled(take or {}))
        deadline = time.time() + timeout  # the ranks' limit, too, however late they start
        program = ["-m", "mpi4py", "-m", "lvxattn.mpi_impl.jupyter.rank", name, str(deadline)]
        command = [*find_mpiexec(), "-n", str(ranks), sys.executable, *program, *(give or [])]
        with _started(command, ranks, folder / "said") as process:
            try:
                process.wait(timeout + _GRACE)
            except subprocess.TimeoutExpired:
                where = _where(folder, source, ranks)
                raise CellError(f"not done after {timeout:g} s, and ended.\n{where}") from None
        printed = [_read(folder / f"printed.{rank}") for rank in range(ranks)]
        if process.returncode or not (folder / "give.pickle").exists():
            raise CellError(_raised(folder, ranks) or _ended(process.returncode, folder))
        return Ran(printed, pickle.loads((folder / "give.pickle").read_bytes()))


def find_mpiexec() -> list[str]:
    """Return the launcher's command: ``LVXATTN_MPIEXEC``, Python's neighbour, or PATH's.

    A notebook's kernel may have been started without the environment on PATH.

    Raises
    ------
    CellError
        There is none.
    """
    command = shlex.split(os.environ.get("LVXATTN_MPIEXEC", ""))
    beside = Path(sys.executable).with_name("mpiexec")
    command = command or [str(beside) if beside.exists() else "mpiexec"]
    if shutil.which(command[0]) is None:
        raise CellError(
            f"there is no {command[0]}; set LVXATTN_MPIEXEC to the command of your MPI's launcher"
        )
    return command


@contextmanager
def _started(command: list[str], ranks: int, said: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command; when this is over, whatever it started is over, too.

    What it says goes to a file: a pipe is open for as long as anybody has it.
    """
    mark = uuid.uuid4().hex
    environment = {**os.environ, _MARK: mark}
    if not any(environment.get(name) for name in BLAS_VARIABLES):
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment |= dict.fromkeys(BLAS_VARIABLES, str(threads))
    with open(said, "w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _GONE
        while (left := _marked(mark)) and time.monotonic() < deadline:
            for number in left:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.01)
        process.wait()


def _marked(mark: str) -> list[int]:
    """Return the processes that have inherited a mark; none where there is no ``/proc``."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is not ours to look at
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _pickled(take: dict[str, Any]) -> bytes:
    for name, value in take.items():
        try:
            pickle.dumps(value)
        except Exception as error:  # whatever a type raises that cannot be pickled
            raise CellError(f"--take: {name} cannot be pickled: {error}") from None
    return pickle.dumps(take)


def _where(folder: Path, source: str, ranks: int) -> str:
    """Say at which line of the cell each rank is."""
    lines = source.splitlines()
    told = []
    for rank in range(ranks):
        # The innermost call comes first.
        at = re.search(r'File ".*cell\.py", line (\d+)', _read(folder / f"stack.{rank}"))
        if at is None:
            started = (folder / f"stack.{rank}").exists()
            told.append(f"rank {rank} {'has ended' if started else 'has not started'}")
            continue
        number = int(at[1])
        told.append(f"rank {rank} is at line {number}: {lines[number - 1].strip()}")
    return "\n".join(told)


def _raised(folder: Path, ranks: int) -> str:
    """Return what was raised, each different thing once, the first first."""
    files = sorted(folder.glob("raised.*"), key=lambda path: path.stat().st_mtime_ns)
    by_text: dict[str, list[int]] = {}
    for path in files:
        by_text.setdefault(path.read_text(), []).append(int(path.suffix[1:]))
    told = []
    for text, who in by_text.items():
        names = f"rank {who[0]}" if len(who) == 1 else f"ranks {', '.join(map(str, sorted(who)))}"
        told.append(f"{names} of {ranks} raised\n{text.rstrip()}")
    return "\n\n".join(told)


def _ended(status: int, folder: Path) -> str:
    tail = "\n".join(_read(folder / "said").strip().splitlines()[-15:])
    return f"the ranks ended with status {status}, and no rank says why\n{tail}".rstrip()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
