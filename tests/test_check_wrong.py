"""The oracle on known wrong kernels, all caught and diagnosed, and on correct ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lvxattn.check import Case, case_of, check
from lvxattn.check.cases import CASES
from lvxattn.check.self_test import (
    SelfTest,
    check_correct_kernels,
    check_wrong_kernels,
    self_test,
)
from lvxattn.check.wrong import WRONG, KernelBase
from tests.kernel_cache import cached_kernels  # noqa: F401

Caught = dict[str, dict[str, list[str]]]

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "oracle.md"


every_wrong_kernel = pytest.mark.parametrize("name", WRONG)


@pytest.fixture(scope="module")
def found() -> SelfTest:
    """The wrong kernels caught in fp32, and the others in fp16 and fp64."""
    caught = check_wrong_kernels(("float32",))
    for dtype in ("float16", "float64"):
        caught |= check_wrong_kernels((dtype,), [name for name in WRONG if not caught[name]])
    return SelfTest(caught, {}, (), seeds=1)


@every_wrong_kernel
def test_case_catches_it(name: str, found: SelfTest) -> None:
    assert found.caught[name]


@every_wrong_kernel
def test_the_diagnosis_names_it(name: str, found: SelfTest) -> None:
    caught = found.caught[name]
    by_effort = sorted(caught, key=lambda case: case_of(case).S_KV)
    # The library is searched on the first that fails, most often one that other tests share.
    names = dict.fromkeys(["gaussian", "lse-low", "one-hot-table", "padding-mask", *by_effort[:2]])
    dtype = next(iter(caught.values()))[0]
    dtypes = [dtype]
    if caught.keys() == {"other-dtype-before"}:  # it shows only in a check of two
        dtypes.append("float64" if dtype == "float32" else "float32")
    report = check(WRONG[name](), cases=[case_of(name) for name in names], dtypes=dtypes)
    assert report.failed
    assert f"*{name}*" in report.probably.partition(":")[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_is_the_only_one_to_catch_a_wrong_kernel(case: Case, found: SelfTest) -> None:
    assert found.unique()[case.name]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread of PyTorch: the problems are small."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_correct_kernels_pass() -> None:
    ratios, alarms = check_correct_kernels(seeds=1)
    assert alarms == ()
    assert {"naive", "4 shards", "64 shards", "PyTorch's SDPA on the CPU"} <= ratios.keys()
    assert all(0 < ratio <= 1 for by_dtype in ratios.values() for ratio in by_dtype.values())


def test_false_alarm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvxattn.check.self_test.CASES", [case_of("one-query")])
    monkeypatch.setattr(KernelBase, "_kv_head", WRONG["heads tiled"]._kv_head)
    ratios, alarms = check_correct_kernels(seeds=1)
    assert ratios["4 shards"]["float32"] > 1
    assert any(alarm.startswith("4 shards: one-query, float32, seed 0") for alarm in alarms)


@pytest.mark.parametrize("shards", [1, 2, 7, 64])
def test_correct_kernel_passes_for_any_key_cut(shards: int) -> None:
    cases = [case_of("fewer-keys-than-shards"), case_of("dead-shard"), case_of("grouped-heads")]
    check(KernelBase(shards), cases=cases).raise_if_failed()


class TestSelfTestOutcome:
    """It passes if nothing is missing, and otherwise names it."""

    @pytest.fixture
    def passed(self, found: SelfTest) -> SelfTest:
        return SelfTest(found.caught, {"naive": {"float32": 0.5}}, (), seeds=1)

    def test_complete_outcome_passes(self, passed: SelfTest) -> None:
        assert passed.passed
        assert str(passed).endswith("passed")

    def test_uncaught_kernel_is_reported(self, passed: SelfTest) -> None:
        missing = replace(passed, caught={**passed.caught, "no scale": {}})
        assert not missing.passed
        assert "not caught: no scale" in str(missing)

    def test_redundant_case_is_reported(self, passed: SelfTest) -> None:
        caught = {n: c for n, c in passed.caught.items() if n != "scores capped at 700"}
        missing = replace(passed, caught=caught)
        assert not missing.passed
        assert "never alone: lse-high" in str(missing)

    def test_false_alarm_fails(self, passed: SelfTest) -> None:
        missing = replace(passed, alarms=("naive: gaussian, float32, seed 0: 1.20 of the limit",))
        assert not missing.passed
        assert "naive: gaussian, float32" in str(missing)

    def test_kernel_missed_by_quick_suite_is_reported(self, passed: SelfTest) -> None:
        assert "keys beyond 4,096 dropped" in passed.missed(("float32", "float16", "float64"))
        assert "half-precision lse" in passed.missed(("float32",))
        assert "half-precision lse" not in passed.missed(("float32", "float16"))

    def test_matrix_marks_single_catches(self, passed: SelfTest) -> None:
        lines = str(passed).splitlines()
        header = next(line for line in lines if line.split() == _LETTERS)
        tiled = next(line for line in lines if line.startswith("heads tiled "))
        letters = {case.name: letter for case, letter in zip(CASES, "".join(_LETTERS), strict=True)}
        marks = {case: tiled[header.index(letter)] for case, letter in letters.items()}
        alone = "mask-of-grouped-heads", "one-query", "hidden-rows"
        assert [marks.pop(case) for case in alone] == ["#"] * 3
        together = "grouped-heads", "many-heads"
        assert [marks.pop(case) for case in together] == ["+"] * 2
        assert set(marks.values()) == {"."}


_LETTERS = [
    "a",
    "bcdefghi",
    "jklm",
    "nopqrs",
    "tuvw",
    "xyzABCDE",
    "F",
    "GH",
    "I",
    "JKL",
    "MNOPQ",
    "RSTUV",
    "W",
    "XY",
    "Z0",
    "1",
    "2",
]


def test_outcome_is_written_to_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: SelfTest
) -> None:
    monkeypatch.setattr("lvxattn.check.self_test.check_wrong_kernels", lambda: found.caught)
    monkeypatch.setattr(
        "lvxattn.check.self_test.check_correct_kernels",
        lambda seeds: ({"naive": {"float32": seeds / 10}}, ()),
    )
    outcome = self_test(seeds=3, path=str(tmp_path / "oracle.md"))
    assert outcome.seeds == 3
    assert outcome.ratios == {"naive": {"float32": 0.3}}
    assert str(outcome) in (tmp_path / "oracle.md").read_text()


@pytest.mark.parametrize("seeds", [0, -1])
def test_too_few_seeds_raise(seeds: int) -> None:
    with pytest.raises(ValueError, match=f"seeds: expected at least 1, got {seeds}"):
        self_test(seeds=seeds)


def test_recorded_outcome_is_current(found: SelfTest) -> None:
    recorded = COMMITTED.read_text().splitlines()
    assert "passed" in recorded
    width = max(map(len, WRONG))
    rows = {line[:width].strip() for line in recorded[recorded.index("```text") :]}
    assert set(WRONG) <= rows
    assert all(any(case.name in line.split() for line in recorded) for case in CASES)
