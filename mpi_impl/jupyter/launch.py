"""Start the ranks of a cell, wait for them, and leave none behind."""

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from lvxattn.mpi_impl.jupyter import guard
from lvxattn.mpi_impl.jupyter.report import CELL, CellError, ask, failed, printed, where
from lvxattn.mpi_impl.jupyter.variables import load, store
from lvxattn.mpi_impl.transport.device import BLAS_VARIABLES

# Seconds after the limit at which guards end ranks that the notebook should have ended.
_LATE = 10.0
# How many ranks may be asked for: a few keys too many must not flood the machine.
_RANKS, _RANKS_A_CORE = 64, 16
# Magics, commands of the shell, and questions.
_OF_IPYTHON = re.compile(r"^\s*(\w+\s*=\s*)?[%!]|^\s*\?{1,2}[\w.*]+\s*$|^\s*[\w.*]+\?{1,2}\s*$")


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
        At most 16 for each core that this process may use, or 64 if that is more.
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
        A rank raised: its traceback, once, whoever else raised the same.  Or it was killed, or
        left.  Or the time was up, or somebody interrupted: the line at which each rank was.  Or
        the source is no Python, or a variable cannot be sent, or there are too many ranks, or no
        launcher.  Its `printed` is what the ranks had printed.
    ValueError
        `ranks` is no whole number from 1 up, or `timeout` is not above 0.

    Notes
    -----
    When this process dies, the ranks end, too.  Of what ranks start, that which takes both a
    session and an environment of its own (``setsid env -i``) is not found, and goes on.
    """
    if not isinstance(ranks, Integral) or isinstance(ranks, bool) or ranks < 1:
        raise ValueError(f"ranks: expected a whole number from 1 up, got {ranks!r}")
    if not timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
    cores = len(os.sched_getaffinity(0))
    if ranks > (most := max(_RANKS, _RANKS_A_CORE * cores)):
        raise CellError(f"{ranks} ranks are too many: at most {most} on {cores} cores")
    _check(source)
    # A guard may have removed it.
    with tempfile.TemporaryDirectory(prefix="lvxattn-cell-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "cell.py").write_text(source, "utf-8")
        store(folder / "take.pickle", take or {}, "--take")
        program = ["-m", "mpi4py", "-m", "lvxattn.mpi_impl.jupyter.rank", name, str(ranks)]
        command = [
            *[*find_mpiexec(), "-n", str(ranks)],
            *[sys.executable, "-P", "-S", guard.__file__, name, str(timeout + _LATE)],
            *[sys.executable, "-u", *program, *(give or [])],
        ]
        try:
            _run(command, folder, source, ranks, timeout)
            given = load(folder / "give.pickle", "--give")
        except CellError as error:
            error.printed = printed(folder, ranks)
            raise
        return Ran(printed(folder, ranks), given)


def find_mpiexec() -> list[str]:
    """Return the launcher's command: ``LVXATTN_MPIEXEC``, Python's neighbour, or PATH's.

    A notebook's kernel may have been started without the environment on PATH.

    Raises
    ------
    CellError
        There is none.
    """
    told = os.environ.get("LVXATTN_MPIEXEC", "")
    try:
        command = shlex.split(told)
    except ValueError as error:
        raise CellError(f"LVXATTN_MPIEXEC: expected a command, got {told} ({error})") from None
    beside = Path(sys.executable).with_name("mpiexec")
    command = command or [str(beside) if beside.exists() else "mpiexec"]
    if shutil.which(command[0]) is None:
        raise CellError(
            f"there is no {command[0]}; set LVXATTN_MPIEXEC to the command of your MPI's launcher"
        )
    return command


def _check(source: str) -> None:
    """Refuse what is no Python, before there are ranks."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the ranks will warn
            compile(source, CELL, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        number = getattr(error, "lineno", None) or 0
        line = "".join(source.splitlines()[number - 1 : number])
        if _OF_IPYTHON.search(line):
            told = f"ranks run plain Python, and line {number} is for IPython: {line.strip()}"
        else:
            lines = traceback.format_exception_only(error)
            told = f"the cell is no Python\n{''.join(lines).rstrip()}"
        raise CellError(told) from None


def _run(command: list[str], folder: Path, source: str, ranks: int, timeout: float) -> None:
    """Run the ranks, and raise CellError unless they end well."""
    limit, status, stopped = time.monotonic() + timeout, 1, ""
    with _started(command, folder, ranks) as process:
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            stopped = f"not done after {timeout:g} s, and ended"
        except KeyboardInterrupt:
            stopped = "interrupted, and ended"
        if stopped:
            ask(folder, ranks)
            told = [f"{stopped}.\n{where(folder, source, ranks)}", failed(folder, source, ranks)]
            raise CellError("\n\n".join(filter(None, told)))
    if status and time.monotonic() > limit:  # this process was stopped, and guards ended the ranks
        raise CellError(f"not done after {timeout:g} s, and ended")
    if status or not (folder / "give.pickle").exists():
        raise CellError(failed(folder, source, ranks) or _ended(status, folder, command[0]))


@contextmanager
def _started(command: list[str], folder: Path, ranks: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command; when this is over, whatever it started is over, too.

    What it says goes to a file: a pipe is open for as long as anybody has it.
    """
    mark = uuid.uuid4().hex
    environment = {**os.environ, guard.MARK: mark, "PYTHONIOENCODING": "utf-8"}
    if not any(environment.get(name) for name in BLAS_VARIABLES):
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment |= dict.fromkeys(BLAS_VARIABLES, str(threads))
    with open(folder / "notebook", "w") as lock, open(folder / "said", "w") as said:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # for as long as this process lives, at most
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
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
            guard.end(mark)
            process.wait()


def _ended(status: int, folder: Path, launcher: str) -> str:
    said = (folder / "said").read_text(errors="replace").strip()
    tail = "\n".join(said.splitlines()[-15:])
    started = [*folder.glob("stack.*"), *folder.glob("status.*")]  # of ranks, and of their guards
    if started:
        return f"the ranks ended with status {status}, and no rank says why\n{tail}".rstrip()
    return f"no rank was started; {launcher} ended with status {status}\n{tail}".rstrip()
