"""Run programs under a launcher with a time limit, and end all of their processes."""

import ast
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lvxattn.common.shared_memory import unmapped_files

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parent.parent
# An environment variable that all processes of a run inherit: ranks have sessions of their own.
MARK = "LVXATTN_TEST_RUN"
# Seconds for processes to end after their launcher.
GRACE = 2.0
# When this process has begun: files that are older belong to others.
BEGAN = time.time()
# BLAS threads of each of two ranks on a host: `doctor` advises against fewer.
THREADS = str(max(1, len(os.sched_getaffinity(0)) // 2))
PATIENCE = 30.0  # seconds that a test waits for what takes milliseconds


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes
    ----------
    status : int
    out, err : str
        Its output.
    timed_out : bool
        Whether it was killed at its time limit.
    seconds : float
        Its duration.
    left : tuple of str
        Command lines of processes that outlived the launcher (and were killed); empty without
        ``/proc``.
    """

    status: int
    out: str
    err: str
    timed_out: bool
    seconds: float = 0.0
    left: tuple[str, ...] = ()


def mpiexec(
    P: int,
    *args: str | Path,
    timeout: float = 120.0,
    mpi4py: bool = True,
    strict: bool = True,
    env: dict[str, str | None] | None = None,
) -> Ended:
    """Run ``python -W error -m mpi4py *args`` on P ranks; one that outlives `timeout` is killed.

    Parameters
    ----------
    P : int
    *args
        ``"-m", "module", ...`` or a file, and its arguments.
    timeout : float
        Seconds.
    mpi4py : bool
        Run through ``-m mpi4py``, which ends all ranks when one raises.
    strict : bool
        Warnings are errors; False where a GPU machine's packages have other versions.
    env : dict, optional
        Added to the environment; None takes a variable out of it.
    """
    launcher = shlex.split(os.environ.get("LVXATTN_MPIEXEC", ""))
    launcher = launcher or [str(Path(sys.executable).with_name("mpiexec"))]
    warnings = ["-W", "error"] if strict else []
    runner = [sys.executable, *warnings, *(["-m", "mpi4py"] if mpi4py else [])]
    return launch([*launcher, "-n", str(P), *runner, *map(str, args)], timeout=timeout, env=env)


def launch(
    command: list[str], *, timeout: float, env: dict[str, str | None] | None = None
) -> Ended:
    """Run a command; if it outlives `timeout`, it is killed with all that it started.

    Parameters
    ----------
    command : list of str
    timeout : float
        Seconds.
    env : dict, optional
        Added to the environment; None takes a variable out of it.
    """
    mark = uuid.uuid4().hex
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({MARK: mark, **(env or {})}),
        start_new_session=True,
    )
    timed_out = False
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGKILL)
        _kill(_marked(mark))
        out, err = process.communicate()
    seconds, left = time.monotonic() - start, outlived(mark)
    if process.returncode:
        sweep()
    return Ended(process.returncode, out, err, timed_out, seconds, left)


def environment(changes: dict[str, str | None] | None = None) -> dict[str, str]:
    """Return the environment of a program; None takes a variable out of it."""
    wanted: dict[str, str | None] = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # There are more ranks than cores: those of MPICH that wait sleep, and do not spin.
        "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
        # Compiled code is kept, or every rank would compile the package anew.
        "PYTHONDONTWRITEBYTECODE": None,
        # Programs import tests.*; and this checkout, wherever lvxattn is installed from.
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), *_python_path()]),
        **(changes or {}),
    }
    return {name: value for name, value in wanted.items() if value is not None}


def outlived(mark: str) -> tuple[str, ...]:
    """Kill the processes of a run that are still there after the grace; return their commands."""
    limit = time.monotonic() + GRACE
    while (left := _marked(mark)) and time.monotonic() < limit:
        time.sleep(0.02)
    _kill(left)
    return tuple(left.values())


def report(
    P: int, program: str, *args: str, env: dict[str, str | None] | None = None, timeout: float = 120
) -> Any:
    """Return the JSON that rank 0 of a program of `PROGRAMS` prints; it must end well.

    The program runs once for all equal calls.
    """
    ended, printed = _run_once(P, program, args, tuple((env or {}).items()), timeout)
    assert not ended.timed_out, f"more than {timeout} s\n{ended.out}\n{ended.err}"
    assert ended.status == 0, f"{ended.out}\n{ended.err}"
    assert not ended.left, ended.left
    # MPICH reports here what was not freed; another MPI may print other things.
    assert not ended.err or "LVXATTN_MPIEXEC" in os.environ, ended.err
    return printed


@cache
def _run_once(
    P: int, program: str, args: tuple[str, ...], env: tuple[tuple[str, str | None], ...], t: float
) -> tuple[Ended, Any]:
    ended = mpiexec(P, PROGRAMS / program, *args, env=dict(env), timeout=t)
    return ended, json.loads(ended.out) if ended.status == 0 else None


def _python_path() -> list[str]:
    """Return the folders of ``PYTHONPATH``."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def until(true: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Wait until something is true; return whether it is."""
    limit = time.monotonic() + patience
    while not true() and time.monotonic() < limit:
        time.sleep(0.01)
    return true()


def sweep() -> None:
    """Remove what programs that MPICH has not ended well have left in shared memory."""
    made = {path: _made(path) for path in unmapped_files()}
    made = {path: when for path, when in made.items() if when >= BEGAN}
    if made:
        # A job's file is there for a moment before it is mapped.
        time.sleep(min(1.0, max(0.0, max(made.values()) + 1.0 - time.time())))
        for path in made.keys() & {*unmapped_files()}:
            path.unlink(missing_ok=True)  # other tests sweep, too


def _made(path: Path) -> float:
    """Return when a file was made; 0 if it is no longer there."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _marked(mark: str) -> dict[int, str]:
    """Return the command lines of the living processes of one run, by process id."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes()  # a zombie's is empty
            if f"{MARK}={mark}".encode() in environment.split(b"\0"):
                command = (directory / "cmdline").read_bytes()
                found[int(directory.name)] = command.replace(b"\0", b" ").decode()
        except (OSError, ValueError):  # it has ended, or belongs to another user
            continue
    return found


def _kill(processes: dict[int, str]) -> None:
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def checks_of(program: str) -> list[str]:
    """Return the names of the checks of a program of `PROGRAMS`, without running it."""
    tree = ast.parse((PROGRAMS / program).read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "check" for d in node.decorator_list)
    ]


def gone(pid: int) -> bool:
    """Return whether a process has ended, or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"
