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
from lvxattn.mpi_impl.jupyter.cell_files import (
    CELL,
    CellError,
    ask,
    failed,
    load,
    printed,
    store,
    where,
)
from lvxattn.mpi_impl.transport import death_notice
from lvxattn.mpi_impl.transport.device import BLAS_VARIABLES

# Seconds after the time limit at which guards end ranks that the notebook should have ended.
_LATE = 10.0
# Maximum number of ranks: a typing error must not overload the machine.
_RANKS, _RANKS_A_CORE = 64, 16
# Lines with magics, shell commands or help.
_OF_IPYTHON = re.compile(r"^\s*(\w+\s*=\s*)?[%!]|^\s*\?{1,2}[\w.*]+\s*$|^\s*[\w.*]+\?{1,2}\s*$")


class Ran(NamedTuple):
    """The result of a cell.

    Attributes
    ----------
    printed : list of str
        The output of each rank.
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
    """Run Python source on new MPI ranks.  Not collective.

    Parameters
    ----------
    source : str
    ranks : int
        At most 16 for each core that this process may use, or 64 if that is more.
    timeout : float
        Seconds; ranks that take longer are ended, with all processes that they started.
    take : dict, optional
        Variables for every rank; they are pickled.
    give : list of str, optional
        Names of the variables of rank 0 to return; they are pickled.

    Returns
    -------
    Ran

    Raises
    ------
    CellError
        A rank raised (the message is its traceback, once for equal ones), was killed or exited; or
        the time limit was reached, or the user interrupted (the line at which each rank was); or
        the source is not Python, a variable cannot be sent, there are too many ranks, or no
        launcher.  `printed` is the output of the ranks until then.
    ValueError
        `ranks` is not a whole number from 1 up, or `timeout` is not above 0.

    Notes
    -----
    The ranks end with this process.  Of the processes that ranks start, one with both a session and
    an environment of its own (``setsid env -i``) is not found, and survives.

    Examples
    --------
    >>> run_cell("total = 2 * n", 2, take={"n": 3}, give=["total"]).given
    {'total': 6}
    """
    if not isinstance(ranks, Integral) or isinstance(ranks, bool) or ranks < 1:
        raise ValueError(f"ranks: expected a whole number from 1 up, got {ranks!r}")
    if not timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
    cores = len(os.sched_getaffinity(0))
    if ranks > (most := max(_RANKS, _RANKS_A_CORE * cores)):
        raise CellError(f"{ranks} ranks are too many: at most {most} on {cores} cores")
    _check(source)
    # A guard may have removed the folder.
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
    """Return the launcher's command: ``LVXATTN_MPIEXEC``, the one beside Python, or PATH's.

    A notebook's kernel may run without its environment on PATH.

    Raises
    ------
    CellError
        There is no launcher.
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
    """Raise CellError if the source is not Python, before ranks are started."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the ranks will warn
            compile(source, CELL, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        number = getattr(error, "lineno", None) or 0
        line = "".join(source.splitlines()[number - 1 : number])
        if _OF_IPYTHON.search(line):
            told = f"ranks run plain Python, but line {number} is for IPython: {line.strip()}"
        else:
            lines = traceback.format_exception_only(error)
            told = f"the cell is not Python\n{''.join(lines).rstrip()}"
        raise CellError(told) from None


def _run(command: list[str], folder: Path, source: str, ranks: int, timeout: float) -> None:
    """Run the ranks; raise CellError if they fail."""
    limit, status, stopped = time.monotonic() + timeout, 1, ""
    with _started(command, folder, ranks) as process:
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            stopped = f"not done after {timeout:g} s, ended"
        except KeyboardInterrupt:
            stopped = "interrupted, ended"
        if stopped:
            ask(folder, ranks)
            told = [f"{stopped}.\n{where(folder, source, ranks)}", failed(folder, source, ranks)]
            raise CellError("\n\n".join(filter(None, told)))
    if status and time.monotonic() > limit:  # this process was stopped, and guards ended the ranks
        raise CellError(f"not done after {timeout:g} s, ended")
    if status or not (folder / "give.pickle").exists():
        raise CellError(failed(folder, source, ranks) or _ended(status, folder, command[0]))


@contextmanager
def _started(command: list[str], folder: Path, ranks: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command; at the end, end all processes that it started.

    Its output goes to a file: a pipe stays open as long as any process holds it.
    """
    mark = uuid.uuid4().hex
    environment = {**os.environ, guard.MARK: mark, "PYTHONIOENCODING": "utf-8"}
    environment[death_notice.VARIABLE] = "0"  # guards report deaths
    if not any(environment.get(name) for name in BLAS_VARIABLES):
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment |= dict.fromkeys(BLAS_VARIABLES, str(threads))
    with open(folder / "notebook", "w") as lock, open(folder / "said", "w") as said:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # until this process ends, at the latest
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
        return f"the ranks ended with status {status}, without an error message\n{tail}".rstrip()
    return f"no rank was started; {launcher} ended with status {status}\n{tail}".rstrip()
