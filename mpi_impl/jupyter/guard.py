"""A process between the launcher and a rank: it starts the rank, and writes how it ended.

    python guard.py DIR SECONDS COMMAND ...

    DIR/notebook     locked by the notebook for as long as it waits for the cell
    DIR/status.PID   exit status of the rank whose process is PID

A killed rank cannot report that, and one that hangs cannot end itself.  The notebook ends it; but a
notebook's kernel may be killed, too.  A guard that gets the notebook's lock ends every process of
the cell, and removes DIR.  If a guard itself is killed, its rank ends (see `rank`).  A guard
imports nothing of the package: that would initialize MPI, which only the rank may do.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

# An environment variable that all processes of a cell inherit: ranks may be in other sessions.
MARK = "LVXATTN_CELL"
# An environment variable that tells a rank the process id of its guard.
GUARD = "LVXATTN_GUARD"
# Seconds between attempts to get the lock.
_OFTEN = 0.2
# Seconds for killed processes to disappear.
_GONE = 5.0


def main(folder: Path, seconds: float, command: list[str]) -> int:
    """Run a rank, and return its exit status; not 0 unless it ran the whole cell.

    Parameters
    ----------
    folder : Path
    seconds : float
        Time limit of the rank, in case the notebook holds its lock but does not end the rank.
    command : list of str
    """
    with open(folder / "notebook", "r+") as lock:
        # The launcher communicates with the rank through inherited descriptors, and does not give
        # every rank an input that ends.
        environment = {**os.environ, GUARD: str(os.getpid())}
        rank = subprocess.Popen(command, close_fds=False, stdin=subprocess.DEVNULL, env=environment)
        waiting = threading.Thread(target=rank.wait, daemon=True)
        waiting.start()
        limit = time.monotonic() + seconds
        waiting.join(_OFTEN)
        while waiting.is_alive():
            alone = _is_mine(lock)  # so only one guard gets here: two would end each other
            if alone:
                # Before the launcher is ended, which may end its guards.
                shutil.rmtree(folder, ignore_errors=True)
                end(os.environ[MARK])
            if alone or time.monotonic() > limit:
                rank.kill()
                return 1
            waiting.join(_OFTEN)
    (folder / f"status.{rank.pid}").write_text(str(rank.returncode))
    if rank.returncode == 0 and not (folder / f"done.{rank.pid}").exists():
        return 1
    return rank.returncode if rank.returncode >= 0 else 128 - rank.returncode


def end(mark: str) -> None:
    """End all processes that have inherited a mark, except this one."""
    deadline = time.monotonic() + _GONE
    while (left := _marked(mark)) and time.monotonic() < deadline:
        for number in left:
            with suppress(OSError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


def _is_mine(lock: IO[str]) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it
        return False
    return True


def _marked(mark: str) -> list[int]:
    """Return the processes that have inherited a mark; none where there is no ``/proc``."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or belongs to another user
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [number for number in found if number != os.getpid()]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
