"""Solve problems held in fake device arrays; rank 0 prints what is right, as JSON.

An argument names one synchronisation of `device.py` to leave out, to see that it is missed: send,
receive, deliver, or all.
"""

import json
import sys
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.mpi_impl import device
from tests import fake_cupy
from tests.cases import Case, Problem
from tests.judge import worst_ratios

comm = MPI.COMM_WORLD
CASES = [
    Case("float64", B=2, H=4, H_KV=2, mask="full", cut="ragged"),
    Case("float32", D_V=5, mask="additive", cut="ragged", dtype="float32"),
    Case("float16", mask="callable", dtype="float16"),
    Case("fewer queries than ranks", S_Q=2, S_KV=2),
    Case("300 kB", H=1, H_KV=1, S_Q=8_000 * comm.size, S_KV=12),
]


def to_device(x: Any) -> Any:
    return fake_cupy.asarray(x) if isinstance(x, np.ndarray) else x


def solve(problem: Problem, schedule: str = "lv-xattn") -> dict[str, Any]:
    """Return whole results, as NumPy arrays, of a forward and a backward on the device."""
    host = problem.part(comm.rank, comm.size)
    replicated = schedule == "replicated"
    if replicated:
        host |= {name: getattr(problem, name) for name in ("q", "dout", "dlse")}
    part = {name: to_device(x) for name, x in host.items()}
    arguments = part["q"], part["k"], part["v"]
    options: dict[str, Any] = {"scale": problem.scale, "mask": part["mask"]}
    options |= {"queries": "replicated"} if replicated else {"schedule": schedule}
    out, lse = mpi_impl.cross_attention(*arguments, comm, **options)
    gradients = mpi_impl.cross_attention_backward(
        part["dout"], *arguments, out, lse, comm, dlse=part["dlse"], **options
    )
    for name, x in host.items():
        if isinstance(x, np.ndarray):
            assert fake_cupy.asnumpy(part[name]).tobytes() == x.tobytes(), name
    results = zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True)
    whole = ("out", "lse", "dq") if replicated else ()
    found = {name: fake_cupy.asnumpy(x) for name, x in results}
    return {n: x if n in whole else mpi_impl.unshard(x, comm) for n, x in found.items()}


def buffer_checks() -> dict[str, bool]:
    """Hand one buffer to an impatient MPI, with kernels and copies still in the queue."""
    size = 16
    nine, seven = np.full(size, 9, np.uint8), np.full(size, 7, np.uint8)
    xp = fake_cupy

    sent = device.buffer(xp, size)
    sent.array[:size] = xp.asarray(nine)
    bytes_at_send = np.array(on_host(sent.sendable(size)))

    read = device.buffer(xp, size)
    on_host(read.receivable(size))[:] = nine
    read.deliver(size)
    kernel = read.array[:size] + xp.uint8(0)
    on_host(read.receivable(size))[:] = seven
    read.deliver(size)
    return {
        "what kernels write is sent": bool((bytes_at_send == nine).all()),
        "kernels read a block before the next is received": bool((kernel.get() == nine).all()),
        "what is received is delivered": bool((read.array.get() == seven).all()),
    }


def on_host(memory: Any) -> Any:
    """Return the bytes that MPI would see at once."""
    return memory if isinstance(memory, np.ndarray) else memory.memory


def leave_out(what: str) -> None:
    """Take one synchronisation away, or all."""
    if what == "all":
        device._finish_kernels = lambda xp: None
        return
    for kind in (device.DeviceBuffer, device.StagedBuffer):
        if what == "deliver":
            kind.deliver = lambda self, nbytes: None  # type: ignore[method-assign]
            continue
        name = {"send": "sendable", "receive": "receivable"}[what]

        setattr(kind, name, careless(getattr(kind, name)))


def careless(original: Any) -> Any:
    def call(self: Any, nbytes: int) -> Any:
        finish, device._finish_kernels = device._finish_kernels, lambda xp: None
        try:
            return original(self, nbytes)
        finally:
            device._finish_kernels = finish

    return call


if len(sys.argv) > 1:
    leave_out(sys.argv[1])
aware, why = device.cuda_aware()
kind = type(device.buffer(fake_cupy, 8)).__name__
report = {}
for case in CASES:
    problem = case.make()
    results = solve(problem)
    report[case.name] = max(worst_ratios(problem, results).values()) <= 1
for schedule in () if len(sys.argv) > 1 else ("gather", "ulysses", "replicated"):
    for case in CASES[:3]:
        problem = case.on(schedule, comm.size).make()
        results = solve(problem, schedule)
        report[f"{case.name}, {schedule}"] = max(worst_ratios(problem, results).values()) <= 1
ranks = comm.gather(report | buffer_checks())
if comm.rank == 0:
    json.dump({"ranks": ranks, "decision": [aware, why], "buffer": kind}, sys.stdout)
