"""Real MPI ranks: right for every number of them, however they are called and whatever is slow."""

import ast
import os
from typing import Any

import pytest

from lvxattn.reference.agreement import SCHEDULES
from tests.cases import CASES
from tests.launch import PROGRAMS, report

pytestmark = pytest.mark.mpi

# Every n-th case, by schedule and number of ranks.
EVERY = {
    "lv-xattn": {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 7: 4},
    "ring": {1: 4, 2: 1, 3: 1, 4: 4, 5: 4},
}


def _checks() -> list[str]:
    """Return the names of the checks of run_calls.py, without starting MPI here."""
    tree = ast.parse((PROGRAMS / "run_calls.py").read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "check" for d in node.decorator_list)
    ]


def cases(schedule: str, P: int) -> Any:
    return report(P, "run_cases.py", schedule, str(EVERY[schedule][P]))


def calls(P: int) -> Any:
    return report(P, "run_calls.py")


ALL = [
    (schedule, P, case)
    for schedule in SCHEDULES
    for P, every in EVERY[schedule].items()
    for case in CASES[::every]
]


@pytest.mark.parametrize(("schedule", "P", "case"), ALL, ids=lambda x: getattr(x, "name", None))
class TestCases:
    def test_equals_naive_softmax_and_its_gradients(self, schedule: str, P: int, case: Any) -> None:
        errors = cases(schedule, P)[case.name]["truth"]
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
        assert max(errors.values()) <= 1, errors

    def test_equals_the_reference_on_virtual_ranks(self, schedule: str, P: int, case: Any) -> None:
        errors = cases(schedule, P)[case.name]["reference"]
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
        assert max(errors.values()) <= 1, errors

    def test_gives_the_same_bits_again_and_with_a_layout(
        self, schedule: str, P: int, case: Any
    ) -> None:
        assert cases(schedule, P)[case.name]["same bits"]

    def test_results_have_the_dtype_of_the_inputs_and_lse_that_of_sums(
        self, schedule: str, P: int, case: Any
    ) -> None:
        dtypes = cases(schedule, P)[case.name]["dtypes"]
        assert dtypes.pop("lse") == ("float64" if case.dtype == "float64" else "float32")
        assert set(dtypes.values()) == {case.dtype}


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("check", _checks())
def test_calls(check: str, P: int) -> None:
    verdicts = calls(P)[check]
    assert len(verdicts) == P
    assert all(verdict and all(verdict) for verdict in verdicts), verdicts


@pytest.mark.parametrize("P", [2, 3, 4, 5])
def test_right_with_synchronous_sends_and_random_delays(P: int) -> None:
    ranks = report(P, "run_slow.py", "3", "0.02", timeout=60)
    assert len(ranks) == P
    assert all(verdict == [True, True, True] for rank in ranks for verdict in rank), ranks


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("P", "env", "threads"),
    [
        (1, {}, CORES),
        (4, {}, max(1, CORES // 4)),
        (1, {"OMP_NUM_THREADS": "1"}, 1),
        (2, {"OMP_NUM_THREADS": str(CORES)}, CORES),
        (2, {"OPENBLAS_NUM_THREADS": str(CORES)}, CORES),
    ],
)
def test_blas_threads_are_the_ranks_share_of_the_cores_unless_the_environment_says(
    P: int, env: dict[str, str], threads: int
) -> None:
    """Also where ranks outnumber the cores and every one starts a thread for each of them."""
    unset: dict[str, str | None] = {"OMP_NUM_THREADS": None, "OPENBLAS_NUM_THREADS": None}
    ranks = report(P, "run_threads.py", env=unset | env)
    assert [rank["returned"] for rank in ranks] == [threads] * P
    assert [rank["used"] for rank in ranks] == [[threads]] * P
    assert all(rank["right before"] and rank["right after"] for rank in ranks), ranks


def test_no_communicator_is_leaked() -> None:
    assert report(2, "run_leaks.py") is True
