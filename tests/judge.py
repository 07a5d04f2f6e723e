"""Solve a problem on the ranks of a communicator, and hold the results against the truth."""

from types import ModuleType
from typing import Any

import numpy as np

from lvxattn.common.validation import accumulator
from tests.cases import WHOLE, Problem, options_of
from tests.naive import Array, Truth
from tests.tolerances import limits


def worst_ratios(
    problem: Problem, results: dict[str, Array], truth: Truth | None = None, *, fp64: bool = False
) -> dict[str, float]:
    """Return, by name, the largest error over its limit: above 1 is wrong.

    NaN or an infinity where the truth has none, or the other way round, gives infinity.

    Parameters
    ----------
    problem : Problem
    results : dict
        Whole arrays, by name.
    truth : Truth, optional
        The problem's, where it is at hand.
    fp64 : bool
        The implementation computes in fp64 whatever the inputs.
    """
    truth = truth or problem.truth()
    dtype = "float64" if fp64 else problem.case.dtype
    limit = limits(problem.case, truth, dtype, accumulator(dtype))
    return {
        name: ratio(np.asarray(got, np.float64), truth.results[name], limit[name])
        for name, got in results.items()
    }


def ratio(got: Array, want: Array, limit: Array) -> float:
    """Return the largest error over its limit."""
    if got.shape != want.shape or not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return float("inf")
    error = np.zeros(want.shape)
    error[finite] = abs(got[finite] - want[finite])
    return float(np.where(error == 0, 0.0, error / np.maximum(limit, 1e-300)).max(initial=0.0))


def solve(
    problem: Problem,
    comm: Any,
    implementation: ModuleType,
    *,
    schedule: str = "lv-xattn",
    reuse_layout: bool = False,
) -> dict[str, Array]:
    """Return whole out, lse, dq, dk and dv, computed by all ranks of comm, each with its part.

    The schedule is one of `WAYS`.
    """
    part = problem.part(comm.rank, comm.size, schedule)
    q, k, v, mask = part["q"], part["k"], part["v"], part["mask"]
    options: dict[str, Any] = {
        "scale": problem.scale,
        "mask": mask,
        **options_of(schedule, comm.size),
    }
    if reuse_layout:
        options["layout"] = implementation.Layout.agree(q, k, v, comm, **options)
    out, lse = implementation.cross_attention(q, k, v, comm, **options)
    dq, dk, dv = implementation.cross_attention_backward(
        part["dout"], q, k, v, out, lse, comm, dlse=part["dlse"], **options
    )
    parts = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    whole = WHOLE.get(schedule, ())
    return {n: x if n in whole else implementation.unshard(x, comm) for n, x in parts.items()}
