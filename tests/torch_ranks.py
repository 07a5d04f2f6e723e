"""Start programs on the ranks of a process group, in time, and leave no process behind.

The programs are those of `tests.launch`, but for a few of PyTorch's own: `programs.start` gives
them whichever communicator they were started with.
"""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from tests.launch import PROGRAMS, Ended, launch

# What a program reads: where the ranks meet, this rank's number, how many there are.
STORE, RANK, SIZE = "LVXATTN_TEST_STORE", "LVXATTN_TEST_RANK", "LVXATTN_TEST_SIZE"


def ranks(
    P: int, program: str, *args: str, timeout: float = 120.0, strict: bool = True
) -> list[Ended]:
    """Run a program of `PROGRAMS` on P ranks; return how each of them ended.

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
    ended = ranks(P, program, *args, timeout=timeout)
    return ended, json.loads(ended[0].out) if not any(e.status for e in ended) else None
