"""Start programs on the ranks of a process group, in time, and leave no process behind.

The programs are those of `tests.launch`, but for a few of PyTorch's own: `programs.start` gives
them whichever communicator they were started with.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from tests.launch import GRACE, MARK, PROGRAMS, ROOT, Ended, kill, marked

# What a program reads: where the ranks meet, this rank's number, how many there are.
STORE, RANK, SIZE = "LVXATTN_TEST_STORE", "LVXATTN_TEST_RANK", "LVXATTN_TEST_SIZE"


def ranks(
    P: int, program: str, *args: str, timeout: float = 60.0, env: dict[str, str] | None = None
) -> list[Ended]:
    """Run a program of `PROGRAMS` on P ranks; return how each of them ended.

    Unlike torchrun, nobody ends the others when one rank fails.  What outlives `timeout` (seconds)
    is killed.
    """
    mark = uuid.uuid4().hex
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wanted = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            STORE: f"{folder}/store",
            SIZE: str(P),
            MARK: mark,
            **(env or {}),
        }
        command = [sys.executable, "-W", "error", str(PROGRAMS / program), *args]
        files = [[Path(folder, f"{name}{rank}") for name in ("out", "err")] for rank in range(P)]
        processes = []
        for rank, (out, err) in enumerate(files):
            with out.open("w") as stdout, err.open("w") as stderr:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        stderr=stderr,
                        env=wanted | {RANK: str(rank)},
                        start_new_session=True,
                    )
                )
        ended = []
        for process, (out, err) in zip(processes, files, strict=True):
            timed_out = False
            try:
                process.wait(max(0.0, start + timeout - time.monotonic()))
            except subprocess.TimeoutExpired:
                timed_out = True
                kill(marked(mark))
                process.wait()
            seconds = time.monotonic() - start
            ended.append(
                Ended(process.returncode, out.read_text(), err.read_text(), timed_out, seconds)
            )
        until = time.monotonic() + GRACE
        while (left := marked(mark)) and time.monotonic() < until:
            time.sleep(0.02)
        kill(left)
        assert not left, left
    return ended


def torch_report(P: int, program: str, *args: str, timeout: float = 100.0) -> Any:
    """Return the JSON that rank 0 of a program of `PROGRAMS` prints; all ranks must end well.

    However often it is asked for, the program runs once.
    """
    ended, printed = _run_once(P, program, args, timeout)
    for rank, end in enumerate(ended):
        assert not end.timed_out, f"rank {rank}: more than {timeout} s\n{end.out}\n{end.err}"
        assert end.status == 0, f"rank {rank}:\n{end.out}\n{end.err}"
        assert not end.err, end.err
    return printed


@cache
def _run_once(P: int, program: str, args: tuple[str, ...], timeout: float) -> tuple[Any, Any]:
    ended = ranks(P, program, *args, timeout=timeout)
    return ended, json.loads(ended[0].out) if not any(e.status for e in ended) else None
