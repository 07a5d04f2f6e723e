"""Solve problems held in fake device arrays; rank 0 prints what is right, as JSON.

Arguments name ways to do it: LVXATTN_CUDA_AWARE (empty: unset) and, after a colon, one event of
`buffers.py` to leave out, to see that it is missed.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.mpi_impl.transport import buffers, cuda_aware
from tests import fake_cupy, hidden
from tests.cases import Case, Problem
from tests.judge import worst_ratios


class PointToPoint(MPI.Intracomm):
    """An MPI that takes device memory in messages, and in no collective call."""


def of_the_host(name: str) -> Any:
    """Return a collective call that refuses device memory."""
    call = getattr(MPI.Intracomm, name)

    def refusing(self: Any, *given: Any, **options: Any) -> Any:
        for message in given:
            if isinstance(message, list):
                assert not any(isinstance(x, fake_cupy.ndarray) for x in message), name
        return call(self, *given, **options)

    return refusing


for name in ("Ialltoallv", "Iallgatherv", "Ireduce_scatter", "Iallreduce"):
    setattr(PointToPoint, name, of_the_host(name))
comm = PointToPoint(MPI.COMM_WORLD)
CASES = [
    Case("float64", B=2, H=4, H_KV=2, mask="full", cut="ragged"),
    Case("float32", D_V=5, mask="additive", cut="ragged", dtype="float32"),
    Case("float16", mask="callable", dtype="float16"),
    Case("fewer queries than ranks", S_Q=2, S_KV=2),
    Case("300 kB", H=1, H_KV=1, S_Q=8_000 * comm.size, S_KV=12),
]


def to_device(x: Any) -> Any:
    return fake_cupy.asarray(x) if isinstance(x, np.ndarray) else x


def solve(problem: Problem, schedule: str = "lv-xattn") -> tuple[dict[str, Any], dict[str, int]]:
    """Return whole results, as NumPy arrays, of both passes on the device, and who waited."""
    host = problem.part(comm.rank, comm.size)
    replicated = schedule == "replicated"
    if replicated:
        host |= {name: getattr(problem, name) for name in ("q", "dout", "dlse")}
    part = {name: to_device(x) for name, x in host.items()}
    arguments = part["q"], part["k"], part["v"]
    options: dict[str, Any] = {"scale": problem.scale, "mask": part["mask"]}
    options |= {"queries": "replicated"} if replicated else {"schedule": schedule}
    fake_cupy.whole.clear()
    out, lse = mpi_impl.cross_attention(*arguments, comm, **options)
    gradients = mpi_impl.cross_attention_backward(
        part["dout"], *arguments, out, lse, comm, dlse=part["dlse"], **options
    )
    waits = dict(fake_cupy.whole)
    for name, x in host.items():
        if isinstance(x, np.ndarray):
            assert fake_cupy.asnumpy(part[name]).tobytes() == x.tobytes(), name
    results = zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True)
    whole = ("out", "lse", "dq") if replicated else ()
    found = {name: fake_cupy.asnumpy(x) for name, x in results}
    return {n: x if n in whole else mpi_impl.unshard(x, comm) for n, x in found.items()}, waits


@contextmanager
def left_out(what: str) -> Iterator[None]:
    """Take one event away: nobody waits for it."""
    kind, name = what.split(".")
    buffer = getattr(buffers, kind)
    original = getattr(buffer, name)
    nothing = fake_cupy.Event()

    def careless(self: Any, *args: Any) -> Any:
        event, passed, buffers.passed = (
            buffers.event,
            buffers.passed,
            lambda xp, mark: buffers._always,
        )
        buffers.event = lambda xp: nothing
        try:
            return original(self, *args)
        finally:
            buffers.event, buffers.passed = event, passed

    setattr(buffer, name, careless)
    yield
    setattr(buffer, name, original)
    for stream in fake_cupy.Stream.made:  # what nobody waited for may use memory that is gone
        stream.done += len(stream.pending)
        stream.pending.clear()


def passes(careless: bool) -> Any:
    """Return what is right of all that this rank has solved, and who waited."""
    report, waited = {}, {}
    every = "lv-xattn", "ring", "grid", "gather", "ulysses", "replicated"
    for schedule in every[:2] if careless else every:
        cases = CASES if schedule == "lv-xattn" else CASES[:3]
        for case in CASES[:1] if careless else cases:
            problem = case.on(schedule, comm.size).make()
            results, waits = solve(problem, schedule)
            report[f"{case.name}, {schedule}"] = max(worst_ratios(problem, results).values()) <= 1
            waited[f"{case.name}, {schedule}"] = waits
        problems = () if careless else hidden.problems(schedule, comm.size, by_turns=15)
        report[f"hidden rows, {schedule}"] = all(
            hidden.worst(problem, solve(problem, schedule)[0]) <= 1 for problem in problems
        )
    return report, waited


found = {}
for way in sys.argv[1:]:
    aware, _, event = way.partition(":")
    os.environ["LVXATTN_CUDA_AWARE"] = aware
    decision = cuda_aware.cuda_aware(fake_cupy)
    kind = type(buffers.buffer(fake_cupy, 8)).__name__
    with left_out(event) if event else nullcontext():
        ranks = comm.gather(passes(bool(event)))
    found[way] = {"ranks": ranks, "decision": decision, "buffer": kind}
if comm.rank == 0:
    json.dump(found, sys.stdout)
