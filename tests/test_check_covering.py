"""The combinations of sizes, masks, memory and scales: what they cover, and what they catch."""

from itertools import combinations, product
from math import inf
from typing import Any

import numpy as np
import pytest

from lvxattn.check import Case, case_of, check
from lvxattn.check.cases import CASES, suite_of
from lvxattn.check.correct_kernels import Naive
from lvxattn.check.covering import (
    _MOST,
    _MOST_QUICK,
    FACTORS,
    QUICK,
    SIZES,
    covering,
    pairs,
    quick_rows,
    rows,
)
from lvxattn.check.dependence import condition, described, simpler_cases, smallest
from lvxattn.check.frameworks import framework_of
from lvxattn.check.wrong import WRONG, KernelBase
from lvxattn.check.wrong.kernel_base import Array, Partial

# Few scores, so that diagnoses take little time.
SMALL = [case for case in covering() if case.B * case.H * case.S_Q * case.S_KV < 3000]


def scores(values: dict[str, Any]) -> int:
    """Return the least number of scores of a problem with these values."""
    heads = values.get("heads", (1, 1))[0]
    return int(np.prod([heads, *(values.get(name, 1) for name in ("B", "S_Q", "S_KV"))]))


@pytest.mark.parametrize(
    "names", [*combinations(FACTORS, 2), *combinations(SIZES, 3)], ids=lambda names: "-".join(names)
)
def test_every_combination_occurs(names: tuple[str, ...]) -> None:
    wanted = {
        values
        for values in product(*(FACTORS[name] for name in names))
        if scores(dict(zip(names, values, strict=True))) <= _MOST
    }
    assert wanted
    assert wanted <= {tuple(row[name] for name in names) for row in rows()}


@pytest.mark.parametrize("names", [*combinations(QUICK, 2)], ids="-".join)
def test_every_pair_of_the_quick_suite_occurs(names: tuple[str, ...]) -> None:
    wanted = {
        values
        for values in product(*(QUICK[name] for name in names))
        if scores(dict(zip(names, values, strict=True))) <= _MOST_QUICK
    }
    assert wanted
    assert wanted <= {tuple(row[name] for name in names) for row in quick_rows()}


def test_cases_are_those_of_the_rows() -> None:
    every = zip((*covering(), *pairs()), (*rows(), *quick_rows()), strict=True)
    for case, row in every:
        assert (row["heads"], row["B"], row["D"]) == ((case.H, case.H_KV), case.B, case.D)
        assert np.sign(case.D_V - case.D) == {"as D": 0, "less": -1, "more": 1}[row["D_V"]]
        assert (case.mask, case.memory, case.scale) == (row["mask"], row["memory"], row["scale"])
        assert case_of(case.name) == case
    names = [case.name for case in suite_of("full")]
    assert len({*names}) == len(names)
    assert not {case.name for case in covering()} & {case.name for case in suite_of("quick")}


def test_correct_kernel_passes() -> None:
    report = check(Naive(), cases=SMALL[::4], dtypes=["float64", "float16"])
    assert report.passed, report


class Rare(KernelBase):
    """Wrong where three sizes come together."""

    def __init__(self, B: int, S_Q: int, D: int) -> None:
        super().__init__()
        self.where = (B, S_Q, D)

    def _results(self, q: Array, out: Array, lse: Array) -> Partial:
        if (q.shape[0], *q.shape[2:]) == self.where:
            out[..., -1] = 0
        return out, lse


@pytest.mark.parametrize(("B", "S_Q", "D"), [(5, 64, 96), (1, 129, 17), (3, 1, 128)])
def test_defect_of_three_sizes_is_caught(B: int, S_Q: int, D: int) -> None:
    kernel = Rare(B, S_Q, D)
    assert check(kernel, cases=[c for c in CASES if c.quick], dtypes=["float32"]).passed
    there = [c for c in covering() if (c.B, c.S_Q, c.D) == (B, S_Q, D)]
    report = check(kernel, cases=[*SMALL[:3], *there], dtypes=["float32"])
    assert len(report.failed) >= len(there) >= 1


class ManyKeyHeads(KernelBase):
    """Wrong for more than eight key-value heads."""

    def _kv_head(self, H: int, H_KV: int) -> Array:
        return np.minimum(super()._kv_head(H, H_KV), 7)


def test_report_says_where_it_fails_and_the_smallest_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lvxattn.check.dependence._SECONDS", inf)
    report = check(ManyKeyHeads(), cases=SMALL[:30], dtypes=["float32"])
    assert report.failed
    depends, least = report.notes[:2]
    assert depends.startswith("fails only where H_KV > 8: ")
    assert least.startswith("smallest that fails, from combination-")
    assert least.endswith(" in float32: B 1, H 9, H_KV 9, S_Q 1, S_KV 1, D 1, D_V 1")
    assert str(report).count("combination-") < 30  # those that passed are one line
    assert "\n  combinations " in str(report)


class NegativeScale(KernelBase):
    """Takes a scale as positive."""

    def _scale(self, D: int) -> Any:
        return abs(super()._scale(D))


def test_what_it_depends_on_is_kept() -> None:
    report = check(NegativeScale(), cases=SMALL[:30], dtypes=["float32"])
    assert "fails only where scale is -0.3: " in report.notes[0]
    assert "S_KV 1, D 1, D_V 1, scale -0.3" in report.notes[1]


class Unsteady(KernelBase):
    """Right, but for a last bit that differs from call to call, as by sums in any order."""

    differs = True
    calls = 0

    def _results(self, q: Array, out: Array, lse: Array) -> Partial:
        self.calls += 1
        return (np.nextafter(out, out.dtype.type(9)) if self.calls % 2 else out), lse


def test_calls_that_differ_by_roundings_pass() -> None:
    cases = [case_of("repeated"), case_of("one-key")]  # results are looked at once more afterwards
    report = check(Unsteady(), cases=cases, dtypes=["float32"])
    assert report.passed, report


@pytest.mark.parametrize("name", ["finite-minimum", "one-hot-table"])
def test_smaller_problems_are_problems(name: str) -> None:
    report = check(
        WRONG["additive mask scaled" if name == "finite-minimum" else "exp without a maximum"](),
        cases=[case_of(name)],
        dtypes=["float32"],
    )
    least = report.notes[-1]
    assert least.startswith(f"smallest that fails, from {name} in float32: B 1, ")
    assert ("data one-hot" in least, "S_KV 64" in least) == (name == "one-hot-table",) * 2


def problems(*failing: Case, others: int = 6) -> list[tuple[Case, str, bool]]:
    rest = [Case(f"{n}", "", "", H=2 + n, H_KV=1) for n in range(others)]
    return [*((case, "float32", True) for case in failing), *((c, "float32", False) for c in rest)]


def test_no_condition_is_named_without_evidence() -> None:
    failing = [Case(f"f{n}", "", "", H=20, H_KV=1) for n in range(3)]
    assert condition(problems(*failing)).startswith("fails only where H > 7: 3 of 3")
    assert condition(problems(*failing[:2])) == ""  # two problems have too much in common
    alike = [Case(f"f{n}", "", "", H=3 + n, H_KV=1) for n in range(3)]
    assert condition(problems(*alike)) == ""
    assert condition([(case, "float32", True) for case in failing]) == ""


def test_dtype_is_a_condition() -> None:
    some = [Case(f"{n}", "", "", S_Q=3 + n) for n in range(5)]
    tried = [(case, dtype, dtype == "float16") for case in some for dtype in ("float16", "float32")]
    assert condition(tried).startswith("fails only where dtype is float16: 5 of 5 problems there")


def test_search_for_the_smallest_ends() -> None:
    case = Case("x", "", "", B=5, H=18, H_KV=9, S_Q=130, S_KV=1153, D=96, D_V=40, mask="random")
    found, tried = smallest(
        case, lambda case: case.S_Q >= 3 and case.mask == "random", simpler_cases
    )
    assert described(found) == "B 1, H 1, H_KV 1, S_Q 3, S_KV 1, D 1, D_V 1, mask random"
    assert len(tried) <= 60
    assert not any(fails for small, fails in tried.items() if small.S_Q < 3)
    same, _ = smallest(case, lambda _: False, simpler_cases)
    assert same == case


def test_cache_is_a_part_of_longer_arrays() -> None:
    x = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    view = framework_of("numpy").put(x, "cache")
    assert np.array_equal(view, x)
    assert view.strides[1] > view.shape[2] * view.strides[2]
    assert np.isnan(view.base).sum() == 2 * 3 * 8 * 5  # what lies around it


def test_another_problem_is_called_between_forward_and_backward() -> None:
    called = []

    class Recorded(KernelBase):
        def __call__(self, q: Array, *arguments: Any, **options: Any) -> Partial:
            called.append(("forward", q.sum()))
            return super().__call__(q, *arguments, **options)

        def backward(self, dout: Array, q: Array, *arguments: Any, **options: Any) -> Any:
            called.append(("backward", q.sum()))
            return super().backward(dout, q, *arguments, **options)

    assert check(Recorded(), cases=[case_of("backward-between")], dtypes=["float64"]).passed
    (first, judged), (second, other), *_ = called
    assert (first, second) == ("forward", "forward")
    assert [x for _, x in called] == [judged, other, other, judged]
    assert [name for name, _ in called[2:]] == ["backward", "backward"]
