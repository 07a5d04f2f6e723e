"""Run a command in a process group of its own, which ends with it."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes
    ----------
    status : int or None
        Exit status; None: it was ended at the time limit.
    output : str
        stdout and stderr.
    """

    status: int | None
    output: str


def run(command: list[str], environ: Mapping[str, str], seconds: float) -> Done:
    """Run a command; when it ends, or the time is over, none of its group's processes is left.

    At the time limit it gets a SIGTERM first: torchrun's ranks are in groups of their own, and end
    with it only if it may end them.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process: subprocess.Popen[str] = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                _signal(process, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
            _signal(process, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return Done(status, output.read())


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
