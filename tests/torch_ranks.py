"""Start programs on the ranks of a process group, in time, and leave no process behind.

The programs are those of `tests.launch`, but for a few of PyTorch's own: `programs.start` gives
them whichever communicator they were started with.

To import PyTorch takes seconds of processor time.  So ranks are forks of one process that has it,
`programs/forks.py`, which lives as long as the tests do: from then on a rank is a process like any
other.  `tests.torchrun` starts ranks as a user does.
"""

import atexit
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.launch import MARK, PROGRAMS, Ended, environment, launch, outlived

# What a program reads: where the ranks meet, this rank's number, how many there are.
STORE, RANK, SIZE = "LVXATTN_TEST_STORE", "LVXATTN_TEST_RANK", "LVXATTN_TEST_SIZE"


def ranks(
    P: int, program: str, *args: str, timeout: float = 120.0, strict: bool = True
) -> list[Ended]:
    """Run a program of `PROGRAMS` on P ranks of their own; return how each of them ended.

    Unlike torchrun, nobody ends the others when one rank fails.  What outlives `timeout` (seconds)
    is killed.  With `strict`, warnings are errors.
    """
    warnings = ["-W", "error"] if strict else []
    command = [sys.executable, *warnings, str(PROGRAMS / program), *args]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(P) as pool:
        where: dict[str, str | None] = {STORE: f"{folder}/store", SIZE: str(P)}
        return list(
            pool.map(
                lambda rank: launch(command, timeout=timeout, env=where | {RANK: str(rank)}),
                range(P),
            )
        )


def forked(P: int, *program: str | Path, timeout: float = 250.0) -> Ended:
    """Run ``python *program`` on P forks, in the environment that torchrun gives its ranks.

    One that fails ends the others.  The status is 0 or 1, and what ranks have printed is put
    together in their order.
    """
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": P}
    where["LOCAL_WORLD_SIZE"] = P
    envs = [where | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(P)]
    ends = _fork(list(map(str, program)), envs, timeout, together=True)
    return Ended(
        int(any(end.status for end in ends)),
        "".join(end.out for end in ends),
        "".join(end.err for end in ends),
        any(end.timed_out for end in ends),
        max(end.seconds for end in ends),
        ends[0].left,
    )


def _free_port() -> int:
    """Return a port below those of which the system gives one to any connection meanwhile."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def torch_report(P: int, program: str, *args: str, timeout: float = 250.0) -> Any:
    """Return the JSON that rank 0 of a program of `PROGRAMS` prints; all ranks must end well.

    However often it is asked for, the program runs once.
    """
    ended, printed = _run_once(P, program, args, timeout)
    for rank, end in enumerate(ended):
        assert not end.timed_out, f"rank {rank}: more than {timeout} s\n{end.out}\n{end.err}"
        assert end.status == 0, f"rank {rank}:\n{end.out}\n{end.err}"
        assert not end.left, f"rank {rank}: {end.left}"
        # PyTorch's profiler says on stderr when it starts and stops, and cannot be told not to.
        said = [line for line in end.err.splitlines() if not line.startswith("USDT:")]
        assert not said, f"rank {rank}: {end.err}"
    return printed


def all_right(P: int, *args: str, timeout: float = 250.0) -> None:
    """Run `torch_gpu.py` on P ranks; all that it solves must be right, on every rank."""
    ended = ranks(P, "torch_gpu.py", *args, timeout=timeout, strict=False)
    for rank, end in enumerate(ended):
        assert not end.timed_out, f"rank {rank}: more than {timeout} s\n{end.out}\n{end.err}"
        assert end.status == 0, f"rank {rank}:\n{end.out}\n{end.err}"
        assert not end.left, f"rank {rank}: {end.left}"
    # A backend may have something to say before it.
    reports = json.loads(ended[0].out[ended[0].out.index('{"ranks"') :])["ranks"]
    assert len(reports) == P
    for report in reports:
        assert report
        assert all(report.values()), [name for name, right in report.items() if not right]


@cache
def _run_once(P: int, program: str, args: tuple[str, ...], timeout: float) -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        envs = [{STORE: f"{folder}/store", SIZE: P, RANK: rank} for rank in range(P)]
        ended = _fork([str(PROGRAMS / program), *args], envs, timeout)
    return ended, json.loads(ended[0].out) if not any(e.status for e in ended) else None


def _fork(
    program: list[str], envs: list[dict[str, Any]], timeout: float, *, together: bool = False
) -> list[Ended]:
    """Run a program on as many forks as there are environments; return how each of them ended."""
    mark, start = uuid.uuid4().hex, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "program": program, "folder": folder, "timeout": timeout, "together": together,
            "cwd": os.getcwd(),
            "ranks": [
                environment({MARK: mark, **{name: str(x) for name, x in env.items()}})
                for env in envs
            ],
        }  # fmt: skip
        forks = _forks()
        assert forks.stdin is not None
        assert forks.stdout is not None
        forks.stdin.write(json.dumps(request) + "\n")
        forks.stdin.flush()
        statuses = json.loads(forks.stdout.readline())
        seconds = time.monotonic() - start
        left = outlived(mark)
        said = [
            [Path(folder, f"{name}{rank}").read_text() for name in ("out", "err")]
            for rank in range(len(envs))
        ]
    return [
        Ended(-9 if status is None else status, out, err, status is None, seconds, left)
        for status, (out, err) in zip(statuses, said, strict=True)
    ]


@cache
def _forks() -> "subprocess.Popen[str]":
    """Return the process that forks; it ends with this one."""
    forks = subprocess.Popen(
        [sys.executable, "-W", "error", str(PROGRAMS / "forks.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    atexit.register(_end, forks)
    return forks


def _end(forks: "subprocess.Popen[str]") -> None:
    with forks:
        assert forks.stdin is not None
        forks.stdin.close()
