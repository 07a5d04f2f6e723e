"""What stands between the launcher and a rank: it starts the rank, and writes down how it ended.

    python guard.py DIR SECONDS COMMAND ...

    DIR/notebook     locked by the notebook for as long as it waits for the cell
    DIR/status.PID   what the process PID, the rank, ended with

A rank that is killed tells nobody, and one that is stuck cannot look after itself.  The notebook
would end it; but a notebook's kernel may be killed, too.  A guard that gets the notebook's lock
ends every process of the cell, and removes DIR.  It imports nothing of the package: that would
begin MPI, which is for the rank to do.
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

# All processes of a cell inherit it: ranks may have left the launcher's session.
MARK = "LVXATTN_CELL"
# Seconds between two looks at the lock.
_OFTEN = 0.2
# Seconds for killed processes to be gone.
_GONE = 5.0


def main(folder: Path, seconds: float, command: list[str]) -> int:
    """Run a rank, and return its exit status, which is not 0 unless it came to its end.

    Parameters
    ----------
    folder : Path
    seconds : float
        The rank is ended after these even if the notebook, which was to do it, still has its lock.
    command : list of str
    """
    with open(folder / "notebook", "r+") as lock:
        # The launcher talks with the rank through descriptors, and gives not every rank an input
        # that ends.
        rank = subprocess.Popen(command, close_fds=False, stdin=subprocess.DEVNULL)
        ended = threading.Event()
        threading.Thread(target=_await, args=(rank, ended), daemon=True).start()
        limit = time.monotonic() + seconds
        while not ended.wait(_OFTEN):
            alone = _is_mine(lock)  # and then no other guard's: two would end each other
            if alone:
                # First, as a launcher that is ended may end its guards.
                shutil.rmtree(folder, ignore_errors=True)
                end(os.environ[MARK])
            if alone or time.monotonic() > limit:
                rank.kill()
                return 1
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


def _await(rank: "subprocess.Popen[bytes]", ended: threading.Event) -> None:
    rank.wait()
    ended.set()


def _is_mine(lock: IO[str]) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is another's
        return False
    return True


def _marked(mark: str) -> list[int]:
    """Return the processes that have inherited a mark; none where there is no ``/proc``."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is not ours to look at
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [number for number in found if number != os.getpid()]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
