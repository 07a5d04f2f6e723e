"""Kill a process before each of its accesses to files while it writes a checkpoint.

Run as ``python tests/programs/killed_checkpoint.py FOLDER``.  Prints as JSON, for every trial, the
step of the last complete checkpoint, the step that was being written, and the step resumed from;
the last trial is the first that came to its end.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from lvxattn.torch_impl.commands.train.run_folder import run_folder
from tests.test_checkpoint import ALONE, resumed, taken


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork: PyTorch may have threads
    with run_folder(folder, ALONE):
        taken(folder, 1)
    trials, last, status = [], 1, -signal.SIGKILL
    while status:
        step = 3 - last
        status = attempt(folder, step, killed_at=len(trials))
        assert status in (0, -signal.SIGKILL)
        with run_folder(folder, ALONE):  # unlocked, though its holder was killed
            found = len(resumed(folder)[0])
        trials.append((last, step, found))
        last = found
    print(json.dumps(trials))


def attempt(folder: Path, step: int, killed_at: int) -> int:
    """Write a checkpoint in another process; return how it ended."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def kill(event: str, _: object) -> None:
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.")):
            if count == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    try:
        sys.addaudithook(kill)
        with run_folder(folder, ALONE):
            taken(folder, step)
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
