"""Real ranks, of MPI and of a process group: right for every case and every number of them."""

from typing import Any

import pytest

from tests.cases import BF16, CASES
from tests.launch import report
from tests.torch_ranks import torch_report

pytestmark = pytest.mark.mpi

# Every n-th case, by implementation, schedule and number of ranks.
EVERY = {
    ("mpi", "lv-xattn"): {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 7: 4},
    ("mpi", "ring"): {1: 4, 2: 1, 3: 1, 4: 4, 5: 4},
    ("mpi", "gather"): {1: 4, 2: 2, 3: 1, 5: 4},
    ("mpi", "ulysses"): {2: 2, 3: 1, 4: 4},
    ("mpi", "replicated"): {2: 4, 3: 1, 4: 4},
    ("torch", "lv-xattn"): {1: 1, 2: 1, 3: 1, 4: 3},
    ("torch", "ring"): {1: 4, 2: 1, 3: 2},
    ("torch", "gather"): {1: 4, 2: 4, 3: 1},
    ("torch", "ulysses"): {2: 4, 3: 1},
    ("torch", "replicated"): {3: 1},
}
REPORTS = {"mpi": report, "torch": torch_report}
ALL = [
    (implementation, schedule, P, case)
    for (implementation, schedule), numbers in EVERY.items()
    for P, every in numbers.items()
    for case in (CASES + BF16)[::every]
]


def cases(implementation: str, schedule: str, P: int) -> Any:
    every = EVERY[implementation, schedule][P]
    return REPORTS[implementation](P, "run_cases.py", schedule, str(every))


@pytest.mark.parametrize(
    ("implementation", "schedule", "P", "case"), ALL, ids=lambda x: getattr(x, "name", None)
)
class TestCases:
    def test_equals_naive_softmax_and_its_gradients(
        self, implementation: str, schedule: str, P: int, case: Any
    ) -> None:
        errors = cases(implementation, schedule, P)[case.name]["truth"]
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
        assert max(errors.values()) <= 1, errors

    def test_equals_the_reference_on_virtual_ranks(
        self, implementation: str, schedule: str, P: int, case: Any
    ) -> None:
        errors = cases(implementation, schedule, P)[case.name]["reference"]
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
        assert max(errors.values()) <= 1, errors

    def test_gives_the_same_bits_again_and_with_a_layout(
        self, implementation: str, schedule: str, P: int, case: Any
    ) -> None:
        assert cases(implementation, schedule, P)[case.name]["same bits"]

    def test_results_have_the_dtype_of_the_inputs_and_lse_that_of_sums(
        self, implementation: str, schedule: str, P: int, case: Any
    ) -> None:
        dtypes = cases(implementation, schedule, P)[case.name]["dtypes"]
        assert dtypes.pop("lse") == ("float64" if case.dtype == "float64" else "float32")
        assert set(dtypes.values()) == {case.dtype}
