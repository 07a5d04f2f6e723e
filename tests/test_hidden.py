"""Rows that a mask hides by a finite number are right.

Real ranks solve the same problems in `run_calls.py`, `torch_calls.py` and `run_device.py`.
"""

from functools import partial

import pytest

from lvxattn import reference
from tests.cases import WAYS
from tests.hidden import problems, worst
from tests.judge import solve
from tests.test_full_attention import solve_whole


def test_truth_does_not_use_lse() -> None:
    """It is compared with the naive softmax, which takes no logarithm."""
    for problem in problems("lv-xattn", 1):
        assert worst(problem, solve_whole(problem), fp64=True) <= 1


@pytest.mark.parametrize("P", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", WAYS)
def test_on_virtual_ranks(schedule: str, P: int) -> None:
    for problem in problems(schedule, P):
        truth = problem.truth()
        on_a_rank = partial(solve, problem, implementation=reference, schedule=schedule)
        for results in reference.run_ranks(P, on_a_rank):
            assert worst(problem, results, truth, fp64=True) <= 1
