"""Known wrong distributed functions: a function with the same defect is named, by its results."""

from math import inf
from typing import Any

import pytest

from lvxattn.check import case_of, check_distributed, draw
from lvxattn.check.case_arrays import Problem
from lvxattn.check.judge import RESULTS, ratio_of, truth_for
from lvxattn.check.shards import CUTS, Cut
from lvxattn.check.wrong import ON_RANKS, WRONG, OnRanks
from tests.planted_ranks import Planted

CASES = (
    "gaussian",
    "random-mask",
    "callable-mask",
    "grouped-heads",
    "fewer-keys-than-shards",
    "many-heads",
)
# Of 4 ranks, in reverse.
GROUP = (3, 1)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the search for the smallest problem be ended by its number of calls, not by time."""
    monkeypatch.setattr("lvxattn.check.dependence._SECONDS", inf)


def ratio(kernel: OnRanks, problem: Problem, cut: Cut) -> float:
    """Return the largest error of a distributed function over its limit."""
    results, truth = kernel.results(problem, cut), truth_for(problem.case, problem.dtype, 0)
    return max(ratio_of(name, results[name], problem, truth) for name in RESULTS)


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("P", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [*CASES, "dead-rows", "one-query"])
def test_function_without_a_defect_is_right(name: str, P: int, kind: str) -> None:
    assert ratio(OnRanks(), draw(case_of(name), "float64"), Cut(P, kind)) <= 1


@pytest.mark.parametrize("name", ON_RANKS)
def test_defect_shows(name: str) -> None:
    worst = 0.0
    for arguments in ON_RANKS[name].variants:
        for case in CASES:
            problem = draw(case_of(case), "float64")
            for cut in (Cut(4, "even"), Cut(3, "ragged"), Cut(2, "even", GROUP)):
                try:
                    found = ratio(ON_RANKS[name](**arguments), problem, cut)
                except ValueError:  # its parts do not fit together
                    continue
                worst = max(worst, found)
        assert worst > 1


def test_names_are_their_own() -> None:
    assert not ON_RANKS.keys() & WRONG.keys()


class Ring:
    """A ring of allgathers, with a defect or none; forward and backward."""

    def __init__(self, defect: str = "") -> None:
        self.defect = defect

    def __call__(self, q: Any, k: Any, v: Any, comm: Any, *, scale: float, mask: Any) -> Any:
        return Planted()(q, k, v, comm, scale=scale, mask=mask)

    def backward(self, *arguments: Any, **options: Any) -> Any:
        comm = arguments[-1]
        dq, dk, dv = Planted().backward(*arguments, **options)
        if self.defect == "dk and dv averaged over ranks":
            dk, dv = dk / comm.size, dv / comm.size
        if self.defect == "dk and dv of a neighbour's keys":
            dk, dv = comm.allgather((dk, dv))[(comm.rank + 1) % comm.size]
        if self.defect == "dq summed over ranks":
            dq = sum(comm.allgather(dq))
        return dq, dk, dv


@pytest.mark.parametrize(
    "defect",
    [
        "dk and dv averaged over ranks",
        "dk and dv of a neighbour's keys",
        "dq summed over ranks",
    ],
)
def test_defect_is_named(defect: str) -> None:
    cases = [case_of(name) for name in ("gaussian", "grouped-heads")]
    report = check_distributed(
        Ring(defect), ranks=2, dtypes=["float64"], cases=cases, cuts=["divisible"]
    )
    assert report is not None
    assert report.failed
    assert f"*{defect}*" in report.probably
    assert f"    {defect}: " in str(report)  # it is explained
    assert "smallest that fails, from " in report.notes[-1]
    assert "P=2, divisible: B 1, H 1, H_KV 1, S_Q 2, S_KV 2, D 1, D_V 1" in report.notes[-1]


def test_right_function_gets_no_name() -> None:
    report = check_distributed(
        Ring(), ranks=2, dtypes=["float64"], cases=[case_of("gaussian")], cuts=["divisible"]
    )
    assert report is not None
    assert report.passed, report
    assert not report.probably
