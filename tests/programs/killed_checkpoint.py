"""Kill a process before each of its accesses to files while it writes a checkpoint.

Run as ``python tests/programs/killed_checkpoint.py FOLDER``.  There are two checkpoints after one
step, and the process writes one after two.  Prints as JSON, for every trial, the step that can be
resumed from; the last trial is the first that came to its end.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch

from lvxattn.torch_impl.commands.train.run_folder import run_folder
from tests.test_checkpoint import ALONE, resumed, taken


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork: PyTorch may have threads
    found, status = list[int](), -signal.SIGKILL
    while status:
        with run_folder(folder, ALONE, resume=True):  # unlocked, though its holder was killed
            taken(folder, 1)
            taken(folder, 1)
        status = attempt(folder, killed_at=len(found) + 1)
        assert status in (0, -signal.SIGKILL)
        found.append(len(resumed(folder)[0]))
    print(json.dumps(found))


def attempt(folder: Path, killed_at: int) -> int:
    """Write a checkpoint after two steps in another process; return how it ended."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def kill(event: str, _: object) -> None:
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.")):
            count += 1
            if count == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(kill)
        with run_folder(folder, ALONE, resume=True):
            taken(folder, 2)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
