"""What rounding on the way costs: half precision grows with the ranks of a ring, fp32 does not.

The error of a rounding is anywhere within half a step, of which it has a root mean square of
1 / sqrt(3).  Half a step is u times a power of two that is at most the number and more than half of
it, so that relative to what is rounded it is u / sqrt(3) at most and u / sqrt(12) at least,
however the numbers are distributed.  How roundings add up is in `benchmarks/rounded_wire.py`.
"""

from functools import cache
from math import sqrt

import pytest

from benchmarks.rounded_wire import Problem, errors, rounded
from tests.tolerances import UNIT

RANKS = (2, 4, 8, 16)


@cache
def problem() -> Problem:
    return Problem.random(B=2, H=2, S_Q=64, S_KV=1024, D=16)


def travelled(schedule: str, P: int, wire: str, result: str) -> list[float]:
    if result == "dq":
        return errors(problem().backward(P, schedule, [wire]), problem().dq)
    return errors(problem().forward(P, schedule, [wire, "float64"])[0], problem().out)


@pytest.mark.parametrize("wire", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("result", ["out", "dq"])
@pytest.mark.parametrize("P", RANKS)
def test_error_of_rounding_at_every_hop(P: int, result: str, wire: str) -> None:
    grows = UNIT[wire] * sqrt((P - 1) / 2)
    for error in travelled("lv-xattn", P, wire, result):
        assert grows / sqrt(12) < error < grows / sqrt(3)


@pytest.mark.parametrize("result", ["out", "dq"])
@pytest.mark.parametrize("P", RANKS)
def test_error_of_rounding_once(P: int, result: str) -> None:
    flat = UNIT["bfloat16"] * sqrt((P - 1) / P)
    for error in travelled("gather", P, "bfloat16", result):
        assert flat / sqrt(12) < error < flat / sqrt(3)


@pytest.mark.parametrize("schedule", ["lv-xattn", "gather"])
@pytest.mark.parametrize("P", RANKS)
def test_fp32_wire_error_is_below_half_precision_rounding(P: int, schedule: str) -> None:
    # A merge is off by (2 lse + 8) u of what it joins (tests/tolerances.py), and no part of a ring
    # counts more than the whole.
    out, _ = problem().forward(P, schedule, ["float32", "float32"])
    seen = P * (2 * abs(problem().lse).max() + 8) * UNIT["float32"]
    once = errors(rounded(problem().out, "bfloat16"), problem().out)
    for error, least in zip(errors(rounded(out, "bfloat16"), problem().out), once, strict=True):
        assert error == pytest.approx(least, abs=seen, rel=0)
        assert seen < 0.1 * least


@pytest.mark.parametrize("P", RANKS)
def test_half_precision_lse_costs_more_than_out(P: int) -> None:
    # lse travels as (top, total).  An error in either is one in the weight of all that has been
    # merged, and where the largest score is above 2, bf16 has steps of 1 / 64 for it.
    both, apart = (
        errors(problem().forward(P, "lv-xattn", ["bfloat16", lse])[0], problem().out)
        for lse in ("bfloat16", "float32")
    )
    assert min(both) > 1.2 * max(apart)
