"""Rows of low or large scores: equal ones have a result that no rounding moves.

The scores of a row are exactly equal, so that whatever a mask of a finite number leaves of them in
rounding, its softmax is the plain mean over the keys that are left: all of them where the mask
hides all alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tests.cases import WAYS, Case, Problem, _dtype
from tests.naive import Array, Truth
from tests.tolerances import LEAST, UNIT

LOWS = -1e4, -1e9, -1e15, "min"
CUTS = "even", "ragged", "first"


def problems(schedule: str, P: int, by_turns: int = 1) -> Iterator[Problem]:
    """Yield the problems that `schedule` is to solve on P ranks: lows, dtypes, masks and cuts.

    With `by_turns` one in so many, others for the next schedule and P.
    """
    first = (WAYS.index(schedule) + P) % by_turns
    for make in list(_problems(schedule, P))[first::by_turns]:
        yield make()


def _problems(schedule: str, P: int) -> Iterator[Callable[[], Problem]]:
    for low in LOWS:
        for dtype, mask_dtype in (("float32", "float32"), ("float64", "float64")):
            for cut in CUTS:
                yield partial(_problem, low, dtype, mask_dtype, cut, schedule, P)
    for dtype, mask_dtype in (
        ("float32", "float16"), ("float32", "bfloat16"), ("float16", "float16"),
        ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
    ):  # fmt: skip
        yield partial(_problem, "min", dtype, mask_dtype, "ragged", schedule, P)
    for dtype, size in (("float32", 1e9), ("float64", 1e17)):
        yield partial(_large, size, dtype, schedule, P)


def worst(
    problem: Problem, results: dict[str, Array], truth: Truth | None = None, *, fp64: bool = False
) -> float:
    """Return the largest error of all results over its limit, which does not depend on scores.

    1e-9 in fp64 and 1e-4 in fp32 of a result's size; in 16 bits two roundings of inputs or outputs.
    """
    dtype = "float64" if fp64 else problem.case.dtype
    relative = {"float64": 1e-9, "float32": 1e-4}.get(dtype, 1e-4 + 2 * UNIT[dtype])
    truth, ratios = truth or problem.truth(), []
    for name, got in results.items():
        want = truth.results[name]
        size = np.maximum(abs(want), 1.0) if name == "lse" else truth.sizes[name]
        error = abs(np.asarray(got, np.float64) - want)
        ratios.append(error / (relative * size + 10 * LEAST[dtype]))
    return float(max(x.max(initial=0.0) for x in ratios))  # NaN where one is


def all_right(solve: Callable[[Problem], dict[str, Array]], schedule: str, P: int) -> list[bool]:
    """Return a verdict for every third problem: virtual ranks solve all."""
    return [worst(problem, solve(problem)) <= 1 for problem in problems(schedule, P, by_turns=3)]


def _problem(low: Any, dtype: str, mask_dtype: str, cut: str, schedule: str, P: int) -> Problem:
    problem = _equal(f"hidden by {low} of {mask_dtype}", dtype, cut, schedule, P)
    case, kind = problem.case, _dtype(mask_dtype)
    lowest = float(np.finfo(kind).min if mask_dtype != "bfloat16" else -(2.0**127) * 1.9921875)
    bias = np.zeros((1, 1, case.S_Q, case.S_KV), kind)
    bias[..., ::3, :] = lowest if low == "min" else low  # wholly hidden
    bias[..., 1::3, ::2] = bias.min()  # partly
    return replace(problem, mask=bias)


def _large(size: float, dtype: str, schedule: str, P: int) -> Problem:
    """Return a problem with scores so large that lse has lost the number of keys."""
    return replace(_equal(f"scores of {size:g}", dtype, "ragged", schedule, P), scale=size)


def _equal(name: str, dtype: str, cut: str, schedule: str, P: int) -> Problem:
    """Return a problem in which a row's scores are one number, exactly."""
    case = Case(name, B=2, H=4, H_KV=2, S_Q=7, S_KV=11, dtype=dtype, cut=cut).on(schedule, P)
    problem = case.make()
    # q k^T is that of one component; k has others, so that dq is not 0.
    problem.q[..., 0], problem.q[..., 1:] = np.sign(problem.q[..., 0].astype(float)), 0
    problem.k[..., 0] = 1
    return problem
