"""Diagnoses: the right name for known defects, none for unknown ones."""

from typing import Any

import numpy as np
import pytest

from lvxattn.check import Report, case_of, check
from lvxattn.check.case_arrays import Mask
from lvxattn.check.diagnosis import Suspects
from lvxattn.check.wrong import WRONG
from lvxattn.check.wrong.kernel_base import Array, KernelBase, Partial
from tests.kernel_cache import cached_kernels  # noqa: F401

CASES = [
    case_of(name) for name in ("gaussian", "one-query", "random-mask", "dead-rows", "grouped-heads")
]


def diagnoses(report: Report) -> set[str]:
    """Return what stands between the asterisks."""
    assert report.failed
    return {name for row in report.failed for name in row.diagnosis.split("*")[1::2]}


class Shrunk(KernelBase):
    def _join(self, parts: list[Partial], out: Array) -> Partial:
        out, lse = super()._join(parts, out)
        return np.asarray(out * 0.99, out.dtype), lse


class OtherScale(KernelBase):
    def _scale(self, _D: int) -> Any:
        return 1.05 * self.scale


class SoftCap(KernelBase):
    def _scores(self, q: Array, k: Array) -> Array:
        return np.asarray(5 * np.tanh(super()._scores(q, k) / 5), q.dtype)


class ReversedKeys(KernelBase):
    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        return q, k[:, :, ::-1], v


class Window(KernelBase):
    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        seen = np.arange(self.shape[3])[keys] < np.arange(self.shape[2])[:, None] + 20
        tile = super()._tile(mask, keys)
        return seen[None, None] if tile is None else tile & seen


class ReversedDv(KernelBase):
    def _sum_heads(self, dx: Array, H_KV: int) -> Array:
        return super()._sum_heads(dx, H_KV)[:, :, ::-1]


class Noisy(KernelBase):
    def _join(self, parts: list[Partial], out: Array) -> Partial:
        out, lse = super()._join(parts, out)
        noise = np.random.default_rng(0).standard_normal(out.shape)
        return np.asarray(out + 0.03 * noise, out.dtype), lse


@pytest.mark.parametrize(
    "kernel", [Shrunk, OtherScale, SoftCap, ReversedKeys, Window, ReversedDv, Noisy]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unknown_defect_gets_no_name(kernel: type[KernelBase], dtype: str) -> None:
    report = check(kernel(), cases=CASES[:3], dtypes=(dtype,))
    assert diagnoses(report) == set()
    assert report.probably == ""


class PhantomAndTiled(WRONG["phantom key"], WRONG["heads tiled"]):  # type: ignore[misc]
    pass


class PhantomAndScaled(WRONG["phantom key"], WRONG["no scale"]):  # type: ignore[misc]
    pass


class DeadAndTiled(WRONG["dead rows NaN"], WRONG["heads tiled"]):  # type: ignore[misc]
    pass


@pytest.mark.parametrize("kernel", [PhantomAndTiled, PhantomAndScaled, DeadAndTiled])
def test_two_defects_do_not_give_a_third_name(kernel: type[KernelBase]) -> None:
    own = {name for name, wrong in WRONG.items() if issubclass(kernel, wrong)}
    assert len(own) == 2
    assert diagnoses(check(kernel(), cases=CASES)) <= own


def test_two_defects_in_different_cases_are_both_named() -> None:
    report = check(DeadAndTiled(), cases=CASES)
    assert diagnoses(report) == {"dead rows NaN", "heads tiled"}
    assert report.probably.count("of 6 failures") == 2


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_diagnosis_gives_distance(dtype: str) -> None:
    row = check(WRONG["phantom key"](), cases=CASES[:1], dtypes=(dtype,)).rows[0]
    limit = max(verdict.limit for verdict in row.verdicts)
    assert row.diagnosis.startswith("matches *phantom key* ")
    to = row.diagnosis.removeprefix("matches *phantom key* ")
    assert (0 if to == "exactly" else float(to.removeprefix("to "))) <= limit


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_diagnosis_gives_number_of_shards(shards: int) -> None:
    report = check(WRONG["unweighted merge"](shards), cases=CASES[:1])
    assert f"*unweighted merge* (shards = {shards}) to " in report.rows[1].diagnosis


class ElevenBits(KernelBase):
    """Rounds mantissas to 11 bits where TF32 rounds them to 10."""

    def _dot(self, x: Array, y: Array) -> Array:
        x, y = (np.ascontiguousarray(z).view(np.int32) + 0x800 & ~0xFFF for z in (x, y))
        return super()._dot(x.view(np.float32), y.view(np.float32))


def test_rounding_defect_is_named_by_size_of_error() -> None:
    report = check(ElevenBits(), cases=CASES, dtypes=("float32",))
    assert {row.diagnosis for row in report.rows} == {"error as large as that of *TF32 products*"}


class SingleAndDead(WRONG["fp64 computed in fp32"]):  # type: ignore[misc]
    """Rounds to fp32, and returns NaN for queries that see nothing."""

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        out, lse = super()._join(parts, out)
        return np.where(lse[..., None] == -np.inf, np.nan, out).astype(out.dtype), lse


def test_what_explains_one_dtype_is_told_beside_other_causes() -> None:
    names = ("random-mask", "minus-infinity", "dead-rows", "everything-dead", "dead-shard")
    few = [CASES[0], *map(case_of, names)]
    report = check(SingleAndDead(), cases=few, dtypes=("float32", "float64"), backward=False)
    most = "*fp64 computed in fp32*: explains 3 of 6 failures in float64"
    assert most in report.probably
    assert "*dead rows NaN*" in report.probably
    text = str(report)
    assert "  fp64 computed in fp32: 3 cases in float64, as gaussian\n" in text
    assert text.count("relative error") <= 6  # of the kinds that are shown


def test_values_near_dtype_maximum_are_judged() -> None:
    report = check(WRONG["neighbour's block returned"](), cases=[case_of("finite-minimum")])
    assert {row.status for row in report.rows} == {"wrong"}
    assert diagnoses(report) == {"neighbour's block returned"}


def test_complaint_is_diagnosed() -> None:
    report = check(WRONG["out allocated like q"](), cases=[case_of("value-size")])
    assert {row.status for row in report.rows} == {"error"}
    assert {row.diagnosis for row in report.rows} == {"matches *out allocated like q*"}


class TestPassingCasesRuleOutDiagnoses:
    """With D = 1, a scale of 1 in place of 0.5 may be none, or one's own 1 / sqrt(D)."""

    def test_indistinguishable_defects(self) -> None:
        report = check(WRONG["scale argument ignored"](), cases=[case_of("head-size-1")])
        assert diagnoses(report) == {"no scale", "scale argument ignored"}

    def test_defect_is_excluded_by_a_passing_case(self) -> None:
        report = check(WRONG["scale argument ignored"](), cases=[case_of("head-size-1"), CASES[0]])
        assert diagnoses(report) == {"scale argument ignored"}

    def test_neither_is_left(self) -> None:
        class Other(KernelBase):
            def _scale(self, D: int) -> Any:
                return 1.0 if D == 1 else self.scale

        cases = [case_of(name) for name in ("head-size-1", "gaussian", "one-hot-table")]
        assert "no scale" not in diagnoses(check(Other(), cases=cases))


@pytest.mark.parametrize(
    "name",
    [
        "stale buffer",
        "gradients not zeroed between calls",
        "out's buffer has the last call's dtype",
    ],
)
def test_stale_state_is_diagnosed(name: str) -> None:
    cases = [case_of(name) for name in ("value-size", "non-contiguous", "read-only")]
    report = check(WRONG[name](), cases=cases)
    assert len(report.failed) > 2
    assert {row.diagnosis.split("*")[1] for row in report.failed} == {name}


def test_correct_kernel_is_not_diagnosed() -> None:
    report = check(KernelBase(), cases=CASES)
    assert report.probably == ""
    assert {row.diagnosis for row in report.rows} == {""}


def test_report_shows_both_diagnoses() -> None:
    text = str(check(WRONG["no scale"](), cases=CASES[:2]))
    assert "matches *no scale* exactly" in text
    assert "probably *no scale*: explains 4 of 4 failures" in text


def test_autograd_gradients_are_diagnosed_from_forward() -> None:
    torch = pytest.importorskip("torch")

    def summed(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        if mask is not None or q.shape[1] != k.shape[1]:
            raise NotImplementedError
        quarters = zip(k.chunk(4, dim=2), v.chunk(4, dim=2), strict=True)
        return sum(torch.softmax(scale * q @ x.mT, dim=-1) @ y for x, y in quarters) / 4

    report = check(summed, cases=CASES, framework="torch")
    assert report.probably == "probably *unweighted merge*: explains 2 of 2 failures"


def test_library_search_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Suspects] = []

    class Watched(Suspects):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr("lvxattn.check.suite.Suspects", Watched)
    check(WRONG["no scale"](), cases=CASES)
    check(Shrunk(), cases=CASES[:1], dtypes=("float64",), seeds=14)
    assert [suspects.searches for suspects in made] == [1, 12]
