"""Run a command within its time, and leave nothing of it behind, whatever ends the wait.

    begin  ->  it ends | its time is up | we are interrupted  ->  end all it started  ->  output

Output goes to files: a pipe is open for as long as anybody holds it, and ranks may outlive their
launcher.  What a command started is known by a variable that it hands down; a group of processes is
not enough, as launchers give ranks sessions of their own.
"""

import os
import signal
import subprocess
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
MARK = "LVXATTN_GPU_STEP"
# Seconds that processes have to go in when they are asked to, and when they are made to.
GRACE = 3.0
# Bytes of output that are kept, from its end.
KEPT = 200_000


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes
    ----------
    status : int or None
        None if its time was up, 127 if it could not be started.
    out, err : str
        What it printed; with `joined` all is in ``out``.
    """

    status: int | None
    out: str
    err: str = ""


def run(
    command: Sequence[str], env: dict[str, str], seconds: float, *, joined: bool = False
) -> Ended:
    """Run a command in the repository's root, in `seconds` at most.

    An exception that ends the wait, as an interruption does, is raised when the command is gone.
    """
    mark = uuid.uuid4().hex
    process = None
    try:
        with TemporaryFile() as out, TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=env | {MARK: mark}, stdin=subprocess.DEVNULL, stdout=out,
                    stderr=subprocess.STDOUT if joined else err, start_new_session=True,
                )  # fmt: skip
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process, mark)
            return Ended(status, _tail(out), _tail(err))
    except OSError as error:
        return Ended(127, str(error) if joined else "", str(error))


def _end(process: "subprocess.Popen[bytes] | None", mark: str) -> None:
    """End what is left of a command: a launcher that is asked first takes its ranks along."""
    if process and process.poll() is None:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE)
    for pid in _marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _marked(mark: str) -> list[int]:
    """Return the processes that a command left; none where there is no ``/proc``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - KEPT))
    return file.read().decode(errors="replace")
