"""The limit, computed independently, and results above and below it."""

from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest

from lvxattn.check import Problem, case_of, draw
from lvxattn.check.cases import DTYPES
from lvxattn.check.judge import RESULTS, Truth, judge, norms, truth_of
from lvxattn.check.rounding_model import PLAIN, WAYS, rounded_attention
from lvxattn.cli.tensors import dtype_of
from tests.naive import naive_attention
from tests.tolerances import UNIT

Array = np.ndarray[Any, np.dtype[Any]]


def problem_and_truth(name: str, dtype: str = "float32") -> tuple[Problem, Truth]:
    problem = draw(case_of(name), dtype)
    return problem, truth_of(problem)


def rms(x: Array, rows: Any = slice(None)) -> float:
    return float(np.sqrt((x[:, :, rows] ** 2).mean()))


# The truth.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["gaussian", "grouped-heads", "minus-infinity", "callable-mask", "dead-shard"]
)
def test_truth_is_naive_softmax_of_rounded_inputs(name: str, dtype: str) -> None:
    problem, truth = problem_and_truth(name, dtype)
    x = problem.astype(np.float64)
    naive = naive_attention(x.q, x.k, x.v, x.scale, x.mask, x.dout, np.zeros(x.q.shape[:3]))
    u, n = UNIT["float64"], max(x.q.shape[2], x.k.shape[2])
    for key, want in naive.results.items():
        assert truth.results[key].dtype == np.float64
        dead = want == -np.inf
        assert (dead == (truth.results[key] == -np.inf)).all()
        far = abs(np.where(dead, 0, truth.results[key] - np.where(dead, 0, want)))
        bound = u * (4 * n + 16 * naive.largest_score)
        assert (far <= bound * (naive.sizes[key] + abs(np.where(dead, 0, want)))).all()


def test_truth_of_equal_and_of_peaked_scores() -> None:
    problem, truth = problem_and_truth("uniform-table", "float64")
    v, dout, n = problem.v, problem.dout, problem.k.shape[2]
    mean = np.broadcast_to(v.sum(axis=2, keepdims=True) / n, dout.shape)
    assert (truth.results["out"] == mean).all()
    assert (truth.results["lse"] == log(n)).all()
    np.testing.assert_allclose(
        truth.results["dv"],
        np.broadcast_to(dout.sum(axis=2, keepdims=True) / n, v.shape),
        atol=1e-15,
    )
    assert abs(truth.results["dk"]).max() == 0  # q is 0

    problem, truth = problem_and_truth("one-hot-table", "float64")
    s = np.einsum("bhid,bhjd->bhij", problem.q, problem.k)
    wanted = s.argmax(axis=-1)
    assert (np.sort(s, axis=-1)[..., -1] == 600).all()
    assert (np.sort(s, axis=-1)[..., -2] <= 400).all()  # one bit of six is another
    assert (truth.results["out"] == np.take_along_axis(problem.v, wanted[..., None], 2)).all()
    assert (truth.results["lse"] == 600).all()
    dv = np.zeros_like(problem.v)
    for i in range(wanted.shape[2]):
        for h in range(wanted.shape[1]):
            dv[0, h, wanted[0, h, i]] += problem.dout[0, h, i]
    np.testing.assert_allclose(truth.results["dv"], dv, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform-table", "one-hot-table"])
def test_tables_are_exact_in_every_dtype(name: str, dtype: str) -> None:
    known = draw(case_of(name), dtype).known["out"]
    assert (known.astype(dtype_of(dtype)).astype(np.float64) == known).all()


# The limit.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gaussian", "needle-in-the-last-shard", "gaps-between-shards"])
def test_limit_matches_its_formula(name: str, dtype: str) -> None:
    problem, truth = problem_and_truth(name, dtype)
    x = problem.astype(np.float64)
    naive = naive_attention(x.q, x.k, x.v, x.scale, x.mask, x.dout, np.zeros(x.q.shape[:3]))
    score = x.scale * np.einsum("bhid,bhjd->bhij", abs(x.q), abs(x.k))
    s = x.scale * np.einsum("bhid,bhjd->bhij", x.q, x.k)
    p = np.exp(s - naive.results["lse"][..., None])
    larger = p * (1 + score)
    out_size = np.einsum("bhij,bhjd->bhid", larger, abs(x.v))
    dp_size = np.einsum("bhid,bhjd->bhij", abs(x.dout), abs(x.v))
    plain = np.einsum("bhij,bhjd->bhid", p, abs(x.v))
    delta, larger_delta = (
        np.einsum("bhid,bhid->bhi", abs(x.dout), size)[..., None] for size in (plain, out_size)
    )
    ds_size = larger * (dp_size + delta) + p * larger_delta
    sizes = {
        "out": out_size,
        "lse": 1 + np.where(p > 0, score, 0).max(axis=-1) + abs(naive.results["lse"]),
        "dq": x.scale * np.einsum("bhij,bhjd->bhid", ds_size, abs(x.k)),
        "dk": x.scale * np.einsum("bhij,bhid->bhjd", ds_size, abs(x.q)),
        "dv": np.einsum("bhij,bhid->bhjd", larger, abs(x.dout)),
    }
    low = [rounded_attention(problem, way) for way in WAYS]
    for key in RESULTS:
        kinds = problem.kv_kinds if key in ("dk", "dv") else problem.q_kinds
        want = naive.results[key]
        u, a = UNIT["float32" if key == "lse" else dtype], UNIT["float32"]
        for kind in np.unique(kinds):
            rows = kinds == kind
            largest = max(rms(one[key] - want, rows) for one in low)
            limit = 2 * largest + u * rms(want, rows) + 4 * a * rms(sizes[key], rows)
            assert truth.limits[key][kind] == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "offset-values", "dead-rows", "gaps-between-shards"])
def test_fp64_limit_scales_from_fp32(name: str) -> None:
    (_, wide), (_, narrow) = problem_and_truth(name, "float64"), problem_and_truth(name, "float32")
    for key in RESULTS:
        # The float32 problem's numbers are other ones, by their rounding.
        np.testing.assert_allclose(wide.limits[key] * 2.0**29, narrow.limits[key], rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", RESULTS)
def test_errors_around_the_limit(key: str, dtype: str) -> None:
    problem, truth = problem_and_truth("gaussian", dtype)
    rng = np.random.default_rng(0)
    direction = rng.choice([-1.0, 1.0], truth.results[key].shape)
    # The limit of fp64 is a few units of fp64, in which the sum here is rounded.
    factors, close = ((0.7, 1.4), 0.2) if dtype == "float64" else ((0.99, 1.01), 1e-3)
    for factor in factors:
        got = truth.results[key] + factor * truth.limits[key][0] * direction
        verdict = judge(key, got, problem, truth)
        assert verdict.ratio == pytest.approx(factor, rel=close)
        assert verdict.passed == (factor < 1)
        assert verdict.error / verdict.limit == pytest.approx(factor, rel=close)
        assert verdict.what == ""


def test_zero_truth_allows_no_error() -> None:
    problem, truth = problem_and_truth("everything-dead")
    for key in RESULTS:
        exact = judge(key, truth.results[key], problem, truth)
        assert (exact.ratio, exact.error, exact.passed) == (0.0, 0.0, True)
    wrong = judge("out", np.full(truth.results["out"].shape, 1e-30), problem, truth)
    assert not wrong.passed


def test_results_are_judged_under_any_numpy_error_state() -> None:
    problem, truth = problem_and_truth("gaussian")
    with np.errstate(all="raise"):
        for size in (1e308, 1e-308):
            got = np.full(truth.results["out"].shape, size)
            assert not judge("out", got, problem, truth).passed


# Kinds of rows.


def test_norms_are_per_row_kind() -> None:
    problem = draw(case_of("gaps-between-shards"), "float64")
    problem = replace(problem, q_kinds=np.arange(17) % 3)
    rng = np.random.default_rng(0)
    for key, kinds, shape in (
        ("out", problem.q_kinds, problem.dout.shape),
        ("lse", problem.q_kinds, problem.dout.shape[:3]),
        ("dq", problem.q_kinds, problem.q.shape),
        ("dk", problem.kv_kinds, problem.k.shape),
        ("dv", problem.kv_kinds, problem.v.shape),
    ):
        x = rng.standard_normal(shape)
        x[0, 0, 0] = np.inf  # counts as 0
        finite = np.where(np.isfinite(x), x, 0)
        expected = [rms(finite, kinds == n) for n in range(kinds.max() + 1)]
        np.testing.assert_allclose(norms(problem, key, x), expected, rtol=1e-14)


def test_norms_neither_overflow_nor_underflow() -> None:
    problem = draw(case_of("gaussian"), "float64")
    for size in (1e300, 1e-300):
        np.testing.assert_allclose(norms(problem, "out", np.full(problem.dout.shape, size)), size)


@pytest.mark.parametrize("key", ["dk", "dv"])
def test_error_in_a_small_row_kind_is_caught(key: str) -> None:
    """The last quarter of the keys weighs e^-24 of the first: one norm would not show it."""
    problem, truth = problem_and_truth("gaps-between-shards")
    got = truth.results[key].copy()
    got[:, :, problem.kv_kinds == 3] *= 1.01
    assert rms(got - truth.results[key]) < 0.1 * truth.limits[key][0]
    verdict = judge(key, got, problem, truth)
    assert not verdict.passed
    assert problem.kv_kinds[verdict.index[2]] == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", RESULTS)
def test_single_wrong_row_is_caught_and_located(key: str, dtype: str) -> None:
    problem, truth = problem_and_truth("gaussian", dtype)
    got = truth.results[key].copy()
    got[0, 1, 5] *= -1
    verdict = judge(key, got, problem, truth)
    assert not verdict.passed
    assert verdict.index[:3] == (0, 1, 5)
    assert verdict.got == -verdict.expected
    assert verdict.expected == truth.results[key][verdict.index]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_row_of_minus_10000_is_judged_separately(dtype: str) -> None:
    problem, truth = problem_and_truth("finite-minimum", dtype)
    for key in ("out", "dq"):
        got = truth.results[key].copy()
        got[:, :, -1] = 0
        assert not judge(key, got, problem, truth).passed
    got = truth.results["lse"].copy()
    got[:, :, 0] += 0.1
    assert not judge("lse", got, problem, truth).passed


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ["dead-rows", "minus-infinity"])
def test_out_and_dq_of_dead_rows_must_be_0(case: str, dtype: str) -> None:
    problem, truth = problem_and_truth(case, dtype)
    for key in ("out", "dq"):
        got = truth.results[key].copy()
        assert (got[:, :, 1::4] == 0).all()
        got[0, 1, 5] = 1e-30
        verdict = judge(key, got, problem, truth)
        assert not verdict.passed
        assert verdict.index[:3] == (0, 1, 5)


# NaN and infinities.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_result_fails(bad: float) -> None:
    problem, truth = problem_and_truth("gaussian")
    for key in RESULTS:
        got = truth.results[key].copy()
        at = (0, 1, 3, 2)[: got.ndim]
        got[at] = bad
        verdict = judge(key, got, problem, truth)
        assert verdict.ratio == np.inf
        assert verdict.index == at
        assert f"1 {'NaN' if bad != bad else bad} of {got.size} elements" in verdict.what


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1e30])
def test_lse_of_dead_row_must_be_minus_infinity(bad: float) -> None:
    problem, truth = problem_and_truth("dead-rows")
    assert judge("lse", truth.results["lse"], problem, truth).ratio == 0
    got = truth.results["lse"].copy()
    got[0, 0, 1] = bad
    verdict = judge("lse", got, problem, truth)
    assert verdict.ratio == np.inf
    assert (verdict.index, verdict.expected) == ((0, 0, 1), -np.inf)


# Figures that are only reported.


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulps_at_an_element(dtype: str) -> None:
    problem, truth = problem_and_truth("gaussian", dtype)
    got = truth.results["out"].copy()
    at = np.unravel_index(abs(got).argmax(), got.shape)
    step = 2 * UNIT[dtype] * 2.0 ** np.floor(np.log2(abs(got[at])))
    got[at] += 3 * step
    verdict = judge("out", got, problem, truth)
    assert verdict.ulps == pytest.approx(3)
    assert verdict.max_abs == pytest.approx(3 * step)


def test_ulps_of_small_elements() -> None:
    problem, truth = problem_and_truth("gaussian")
    got = truth.results["out"].copy()
    at = np.unravel_index(abs(got).argmin(), got.shape)
    usual = rms(truth.results["out"])
    got[at] += usual
    assert judge("out", got, problem, truth).ulps <= usual / (2.0**-23 * usual / 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_in_dtype_has_flash_ratio_1(dtype: str) -> None:
    problem, truth = problem_and_truth("gaussian", dtype)
    for key, plain in rounded_attention(problem, PLAIN).items():
        got = plain.astype(np.float64)
        assert judge(key, got, problem, truth).flash == pytest.approx(1)
        double = truth.results[key] + 2 * (got - truth.results[key])
        assert judge(key, double, problem, truth).flash == pytest.approx(2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rounding_models_are_within_half_the_limit(way: Any, dtype: str) -> None:
    problem, truth = problem_and_truth("gaussian", dtype)
    for key, got in rounded_attention(problem, way).items():
        assert 0 < judge(key, got.astype(np.float64), problem, truth).ratio <= 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gaussian", "tail-of-one", "many-heads", "head-size-1"])
def test_lse_of_rounded_scores_passes_whether_or_not_the_scale_rounds(
    name: str, dtype: str
) -> None:
    problem, truth = problem_and_truth(name, dtype)
    assert (np.log2(problem.scale) % 1 == 0) == (
        name in ("many-heads", "head-size-1", "tail-of-one")
    )
    lse = rounded_attention(problem, PLAIN)["lse"].astype(np.float64)
    assert judge("lse", lse, problem, truth).passed
