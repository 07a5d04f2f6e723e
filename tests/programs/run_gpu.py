"""Solve problems in CuPy arrays, on ranks that may share a GPU; rank 0 says in JSON what is right.

With the argument ``fake`` on stand-ins for CuPy's arrays, to see without a GPU that this runs.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from tests.cases import CASES, Case
from tests.judge import solve, worst_ratios

comm = MPI.COMM_WORLD
SCHEDULES = ("lv-xattn", "ring", "grid", "gather", "ulysses", "replicated")
DTYPES = "float64", "float32", "float16", "bfloat16"
WIDE = Case("64 wide", B=2, H=4, H_KV=4, S_Q=40, S_KV=1100, D=64, D_V=64, cut="ragged")
CHOSEN = [
    *(replace(WIDE, name=f"64 wide, {d}", dtype=d) for d in DTYPES),
    Case("fewer queries than ranks", S_Q=2, S_KV=2),
    Case("additive mask", D_V=5, mask="additive", cut="ragged", dtype="float32"),
    Case("callable mask", mask="callable", dtype="float16"),
    # A block of 4 MB, which MPI sends otherwise than a short message.
    Case(
        "a large block", H=1, H_KV=1, S_Q=16_384 * comm.size, S_KV=12, D=64, D_V=64, dtype="float32"
    ),
]

if "fake" in sys.argv:
    from tests import fake_cupy as xp

    CHOSEN, SCHEDULES, CASES = CHOSEN[3:6], ("lv-xattn", "grid", "replicated"), CASES[:6]
else:
    import cupy as xp

    mpi_impl.use_device(comm, xp)
    if int(xp.__version__.partition(".")[0]) < 14:  # which has no bfloat16
        CHOSEN, CASES = ([c for c in some if c.dtype != "bfloat16"] for some in (CHOSEN, CASES))


def to_device(x: Any) -> Any:
    return xp.asarray(x) if isinstance(x, np.ndarray) else x


class OnDevice:
    """`lvxattn.mpi_impl` on NumPy arrays, which it carries to the device and back."""

    Layout = mpi_impl.Layout

    def cross_attention(self, q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
        """Return out and lse."""
        options = {name: to_device(x) for name, x in options.items()}
        out, lse = mpi_impl.cross_attention(*map(to_device, (q, k, v)), comm, **options)
        return xp.asnumpy(out), xp.asnumpy(lse)

    def cross_attention_backward(self, *given: Any, **options: Any) -> Any:
        """Return dq, dk and dv."""
        *arrays, comm = given
        options = {name: to_device(x) for name, x in options.items()}
        gradients = mpi_impl.cross_attention_backward(*map(to_device, arrays), comm, **options)
        return tuple(map(xp.asnumpy, gradients))

    def unshard(self, x: Any, comm: Any, axis: int = 2) -> Any:
        """Join all ranks' parts."""
        return mpi_impl.unshard(x, comm, axis)


report = {}
for schedule in SCHEDULES:
    for case in [*CHOSEN, *CASES[::6]] if schedule == "lv-xattn" else CHOSEN[:6]:
        problem = case.on(schedule, comm.size).make()
        results = solve(problem, comm, OnDevice(), schedule=schedule)  # type: ignore[arg-type]
        right = max(worst_ratios(problem, results).values()) <= 1
        report[f"{case.name}, {schedule}"] = right
buffers = type(mpi_impl.transport.buffers.buffer(xp, 8)).__name__
reports = comm.gather(report)
if comm.rank == 0:
    json.dump({"ranks": reports, "buffer": buffers}, sys.stdout)
