"""Run a command with a time limit, and end all of its processes, whatever ends the wait.

    start  ->  it ends | its time is up | an interruption  ->  end all its processes  ->  output

Output goes to files: a pipe stays open as long as any process holds it, and ranks may outlive their
launcher.  A command's processes are known by an environment variable that they inherit; a process
group is not enough, as launchers give ranks sessions of their own.
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
# Seconds for processes to end after SIGTERM, and after SIGKILL.
GRACE = 3.0
# Bytes kept of the end of the output.
KEPT = 200_000


@dataclass(frozen=True)
class Ended:
    """The result of a command.

    Attributes
    ----------
    status : int or None
        None if its time was up, 127 if it could not be started.
    out, err : str
        Its output; with `joined` all is in ``out``.
    """

    status: int | None
    out: str
    err: str = ""


def run(
    command: Sequence[str], env: dict[str, str], seconds: float, *, joined: bool = False
) -> Ended:
    """Run a command in the repository's root, for at most `seconds`.

    An exception during the wait, such as an interruption, is raised when the command has ended.
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
    """End a command's processes; SIGTERM first, so that a launcher ends its ranks."""
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
    """Return a command's remaining processes; none without ``/proc``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - KEPT))
    return file.read().decode(errors="replace")
