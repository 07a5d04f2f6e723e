"""Start programs under mpiexec, in time, and leave no process behind."""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """How a program ended: exit status, what it printed, and whether its time ran out."""

    status: int
    out: str
    err: str
    timed_out: bool


def mpiexec(
    P: int,
    *args: str | Path,
    timeout: float = 60.0,
    mpi4py: bool = True,
    env: dict[str, str] | None = None,
) -> Ended:
    """Run ``python -m mpi4py *args`` on P ranks; a program that outlives `timeout` is killed.

    Parameters
    ----------
    P : int
    *args
        ``"-m", "module", ...`` or a file, and its arguments.
    timeout : float
        Seconds.
    mpi4py : bool
        Run through ``-m mpi4py``, which ends all ranks when one raises.
    env : dict, optional
        Added to the environment.
    """
    launcher = shlex.split(os.environ.get("LVXATTN_MPIEXEC", ""))
    launcher = launcher or [str(Path(sys.executable).with_name("mpiexec"))]
    runner = [sys.executable, *(["-m", "mpi4py"] if mpi4py else [])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),  # programs import tests.*
        **(env or {}),
    }
    process = subprocess.Popen(
        [*launcher, "-n", str(P), *runner, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
        return Ended(process.returncode, out, err, timed_out=False)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return Ended(process.returncode, out, err, timed_out=True)
