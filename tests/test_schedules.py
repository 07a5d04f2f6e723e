"""The reference, on virtual ranks, against the naive softmax."""

import pytest

from lvxattn import reference
from lvxattn.reference.agreement import SCHEDULES
from tests.cases import CASES, Case
from tests.judge import solve, worst_ratios


@pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_naive_softmax_and_its_gradients(schedule: str, case: Case, P: int) -> None:
    problem = case.make()
    for results in reference.run_ranks(
        P, lambda comm: solve(problem, comm, reference, schedule=schedule)
    ):
        assert max(worst_ratios(problem, results, fp64=True).values()) <= 1
