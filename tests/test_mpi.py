"""Real MPI ranks: all ways of calling them, with delays and synchronous sends."""

import os
from typing import Any

import pytest

from tests.launch import checks_of, report

pytestmark = pytest.mark.mpi


def calls(P: int) -> Any:
    return report(P, "run_calls.py")


@pytest.mark.parametrize("P", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("check", checks_of("run_calls.py"))
def test_calls(check: str, P: int) -> None:
    verdicts = calls(P)[check]
    assert len(verdicts) == P
    assert all(verdict and all(verdict) for verdict in verdicts), verdicts


@pytest.mark.parametrize("P", [3, *(pytest.param(P, marks=pytest.mark.slow) for P in (2, 4, 5))])
def test_synchronous_sends_and_random_delays(P: int) -> None:
    ranks = report(P, "run_slow.py", "3", "0.02", timeout=60)
    assert len(ranks) == P
    assert all(verdict == [True, True, True] for rank in ranks for verdict in rank), ranks


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("P", "env", "threads"),
    [
        pytest.param(1, {}, CORES, marks=pytest.mark.slow),
        (4, {}, max(1, CORES // 4)),
        (1, {"OMP_NUM_THREADS": "1"}, 1),
        pytest.param(2, {"OMP_NUM_THREADS": str(CORES)}, CORES, marks=pytest.mark.slow),
        (2, {"OPENBLAS_NUM_THREADS": str(CORES)}, CORES),
    ],
)
def test_blas_threads_share_the_cores(P: int, env: dict[str, str], threads: int) -> None:
    """With more ranks than cores, each of which starts a thread for every core."""
    unset: dict[str, str | None] = {"OMP_NUM_THREADS": None, "OPENBLAS_NUM_THREADS": None}
    ranks = report(P, "run_threads.py", env=unset | env)
    assert [rank["returned"] for rank in ranks] == [threads] * P
    assert [rank["used"] for rank in ranks] == [[threads]] * P
    assert all(rank["right before"] and rank["right after"] for rank in ranks), ranks


def test_no_communicator_is_leaked() -> None:
    assert report(2, "run_leaks.py") is True
