"""Command lines on real ranks, several in one launch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.launch import PROGRAMS, mpiexec
from tests.torch_ranks import forked

LAUNCHERS = {"mpi_impl": mpiexec, "torch_impl": forked}


@dataclass(frozen=True)
class Said:
    """What a command said on rank 0, and its exit status, the same on all ranks."""

    status: int
    out: str
    err: str


def commands(
    P: int,
    *lines: list[Any],
    breakages: Sequence[str] = (),
    implementation: str = "mpi_impl",
    timeout: float = 120.0,
) -> list[Said]:
    """Run command lines on P ranks, one after the other, each with its breakage, if any.

    Only rank 0 may have said anything, and all ranks must have come to the same exit status.
    """
    words = [[str(word) for word in line] for line in lines]
    pairs = list(zip(breakages or [""] * len(lines), words, strict=True))
    arguments = PROGRAMS / "commands.py", implementation, json.dumps(pairs)
    ended = LAUNCHERS[implementation](P, *arguments, timeout=timeout)
    assert ended.status == 0, ended.out + ended.err
    assert not ended.left, ended.left
    results = []
    for by_rank in json.loads(ended.out):
        assert len({said["status"] for said in by_rank}) == 1, by_rank
        assert not any(said["out"] or said["err"] for said in by_rank[1:]), by_rank
        results.append(Said(**by_rank[0]))
    return results
