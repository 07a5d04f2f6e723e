"""Real ranks, of MPI and of a process group: right for every case and every number of them."""

from typing import Any

import pytest

from tests.cases import BF16, CASES
from tests.launch import report
from tests.torch_ranks import torch_report

pytestmark = pytest.mark.mpi

# Every n-th case, by implementation, schedule and number of ranks.
EVERY = {
    ("mpi", "lv-xattn"): {1: 6, 2: 4, 3: 1, 5: 8},
    ("mpi", "ring"): {3: 2},
    ("mpi", "gather"): {3: 2},
    ("mpi", "ulysses"): {3: 2},
    ("mpi", "replicated"): {3: 2},
    ("mpi", "replicated keys"): {3: 2},
    ("torch", "lv-xattn"): {1: 6, 2: 4, 3: 2},
    ("torch", "ring"): {3: 2},
    ("torch", "gather"): {3: 2},
    ("torch", "ulysses"): {3: 2},
    ("torch", "replicated"): {3: 2},
    ("torch", "replicated keys"): {3: 2},
}
REPORTS = {"mpi": report, "torch": torch_report}
# Other numbers of ranks, and more cases, in which nothing was found yet that is not found above.
MORE = {
    ("mpi", "lv-xattn"): {1: 1, 2: 1, 4: 1, 5: 1, 7: 4},
    ("mpi", "ring"): {1: 4, 2: 1, 3: 1, 4: 4, 5: 4},
    ("mpi", "gather"): {1: 4, 2: 2, 3: 1, 5: 4},
    ("mpi", "ulysses"): {2: 2, 3: 1, 4: 4},
    ("mpi", "replicated"): {2: 4, 3: 1, 4: 4},
    ("mpi", "replicated keys"): {2: 4, 3: 1},
    ("torch", "lv-xattn"): {1: 1, 2: 1, 3: 1, 4: 3},
    ("torch", "ring"): {1: 4, 2: 1, 3: 1},
    ("torch", "gather"): {1: 4, 2: 4, 3: 1},
    ("torch", "ulysses"): {2: 4, 3: 1},
    ("torch", "replicated"): {2: 4, 3: 1},
    ("torch", "replicated keys"): {2: 4, 3: 1},
}
RUNS = [
    pytest.param(*of, P, every, marks=marks)
    for table, marks in ((EVERY, []), (MORE, pytest.mark.slow))
    for of, numbers in table.items()
    for P, every in numbers.items()
]
RESULTS = {"out", "lse", "dq", "dk", "dv"}


@pytest.mark.parametrize(("implementation", "schedule", "P", "every"), RUNS)
class TestCases:
    @pytest.fixture
    def found(self, implementation: str, schedule: str, P: int, every: int) -> dict[str, Any]:
        """Return what is found of every case, by its name."""
        found = REPORTS[implementation](P, "run_cases.py", schedule, str(every))
        assert set(found) == {case.name for case in (CASES + BF16)[::every]}
        return found

    @pytest.mark.parametrize("against", ["truth", "reference"])
    def test_equals_naive_softmax_and_the_reference(
        self, found: dict[str, Any], against: str
    ) -> None:
        assert all(set(of[against]) == RESULTS for of in found.values())
        wrong = {name: of[against] for name, of in found.items() if max(of[against].values()) > 1}
        assert not wrong

    def test_same_bits_again_and_with_a_layout(self, found: dict[str, Any]) -> None:
        assert not [name for name, of in found.items() if not of["same bits"]]

    def test_dtypes_of_results(self, found: dict[str, Any]) -> None:
        for case in CASES + BF16:
            dtypes = found.get(case.name, {}).get("dtypes", {})
            sums = "float64" if case.dtype == "float64" else "float32"
            assert all(dtypes[x] == (sums if x == "lse" else case.dtype) for x in dtypes), case.name
