"""The cases have the properties of their reasons, and are reproducible."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lvxattn.check import Case, Problem, case_of, draw, suite_of
from lvxattn.check.cases import CASES, DTYPES, large
from lvxattn.check.judge import truth_of
from lvxattn.cli.tensors import InputError
from lvxattn.reference import full_attention
from tests.errors import says

Array = np.ndarray[Any, np.dtype[Any]]
NAMES = [case.name for case in CASES if case.name != "long-keys"]
DEAD = {"minus-infinity": slice(1, None, 4), "dead-rows": slice(1, None, 4)}
DEAD["everything-dead"] = slice(None)

DIGEST = """
import hashlib
from lvxattn.check import draw, suite_of
digest = hashlib.sha256()
for case in suite_of("quick"):
    problem = draw(case, "float32", 3)
    for x in (problem.q, problem.k, problem.v, problem.dout, problem.q_kinds, problem.kv_kinds):
        digest.update(x.tobytes())
    if problem.mask is not None and not callable(problem.mask):
        digest.update(problem.mask.tobytes())
print(digest.hexdigest())
"""


def drawn(name: str, dtype: str = "float64", seed: int = 0) -> Problem:
    return draw(case_of(name), dtype, seed)


def scores(problem: Problem) -> Array:
    """Return the scores, without the mask."""
    k = np.repeat(problem.k, problem.case.H // problem.case.H_KV, axis=1)
    s: Array = problem.scale * np.einsum("bhid,bhjd->bhij", problem.q, k)
    return s


def seen(problem: Problem) -> Array:
    """Return which query sees which key: (B, H, S_Q, S_KV)."""
    mask = problem.dense_mask()
    shape = (*problem.q.shape[:3], problem.k.shape[2])
    if mask is None:
        return np.ones(shape, bool)
    return np.broadcast_to(mask if mask.dtype == bool else mask > -np.inf, shape)


def test_same_seed_gives_same_arrays_in_any_process() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": number},
        ).stdout.strip()
        for number in ("1", "2")
    ]
    out: list[Any] = []
    exec(DIGEST.replace("print", "out.append"), {"out": out})
    assert found == out * 2


def test_seed_and_name_change_the_arrays() -> None:
    one = drawn("gaussian")
    others = [drawn("gaussian", seed=1), draw(replace(one.case, name="another"), "float64")]
    assert not any((one.q == other.q).any() for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_arrays_have_sizes_and_dtype_of_the_case(name: str, dtype: str) -> None:
    case, problem = case_of(name), drawn(name, dtype)
    shapes = {
        "q": (case.B, case.H, case.S_Q, case.D),
        "k": (case.B, case.H_KV, case.S_KV, case.D),
        "v": (case.B, case.H_KV, case.S_KV, case.D_V),
        "dout": (case.B, case.H, case.S_Q, case.D_V),
    }
    wide = drawn(name)
    for array, shape in shapes.items():
        x = getattr(problem, array)
        assert x.shape == shape
        assert x.dtype.name == dtype
        assert np.isfinite(x.astype(np.float64)).all()
        # The same numbers in every dtype, rounded once.
        assert (x == getattr(wide, array).astype(x.dtype)).all()
    assert problem.q_kinds.shape == (case.S_Q,)
    assert problem.kv_kinds.shape == (case.S_KV,)
    if isinstance(problem.mask, np.ndarray):
        assert problem.mask.dtype.name in ("bool", dtype)
        np.broadcast_shapes(problem.mask.shape, (case.B, case.H, case.S_Q, case.S_KV))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_dead_only_in_dead_row_cases(name: str) -> None:
    for case in (case_of(name), large(case_of(name))):
        alive = seen(draw(case, "float64")).any(axis=-1)
        expected = np.ones_like(alive)
        if name in DEAD:
            expected[:, :, DEAD[name]] = False
        assert (alive == expected).all()


@pytest.mark.parametrize(
    "name", sorted({case.name for case in CASES if case.mask not in ("none", "all dead")})
)
def test_masks_hide_some_keys(name: str) -> None:
    rows = seen(drawn(name, "float32"))
    if name in ("finite-minimum", "hidden-rows"):
        problem = drawn(name, "float32")
        assert isinstance(problem.mask, np.ndarray)
        rows = np.broadcast_to(problem.mask > np.finfo(np.float32).min, rows.shape)
    some = rows.any(axis=-1)
    assert (some & ~rows.all(axis=-1)).any()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("random-mask", (2, 2, 9, 40)),
        ("mask-over-heads", (2, 1, 9, 40)),
        ("mask-over-batches", (1, 2, 9, 40)),
        ("padding-mask", (2, 1, 1, 40)),
    ],
)
def test_masks_differ_along_unbroadcast_axes(name: str, shape: tuple[int, ...]) -> None:
    mask = drawn(name).mask
    assert isinstance(mask, np.ndarray)
    assert mask.dtype == bool
    assert mask.shape == shape
    for axis, n in enumerate(shape[:3]):
        if n > 1:
            first, second = np.take(mask, 0, axis), np.take(mask, 1, axis)
            assert (first != second).any()


@pytest.mark.parametrize("name", ["random-mask", "mask-over-heads", "mask-over-batches"])
def test_random_mask_shows_the_first_key(name: str) -> None:
    """So that no row is dead by chance, for any seed."""
    assert all(seen(drawn(name, seed=seed))[..., 0].all() for seed in range(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cases_are_drawn_under_any_numpy_error_state(dtype: str) -> None:
    small = replace(case_of("gaussian"), S_KV=10_000)  # some of its numbers are subnormal
    with np.errstate(all="raise"):
        draw(small, dtype)


def test_dead_shards_are_dead_for_all_queries() -> None:
    rows = seen(drawn("dead-shard"))
    assert not rows[..., :20].any()
    assert rows[..., 20].all()
    assert rows[..., 20:].any(axis=(0, 1, 2)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_finite_minimum_mask_values(dtype: str) -> None:
    mask = drawn("finite-minimum", dtype).mask
    assert isinstance(mask, np.ndarray)
    wide = mask.astype(np.float64)
    least = {"float32": -(2.0**128) + 2.0**104, "float16": -65504.0, "bfloat16": -255 * 2.0**120}
    assert np.isfinite(wide).all()
    assert wide.min() == least[dtype]
    assert (wide[:, :, -1] == {"bfloat16": -9984.0}.get(dtype, -10000.0)).all()
    assert drawn("finite-minimum", dtype).q_kinds.tolist() == [0] * 6 + [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["finite-minimum", "hidden-rows"])
def test_row_hidden_by_finite_number_is_the_mean(name: str, dtype: str) -> None:
    problem = drawn(name, dtype)
    truth, rows = truth_of(problem), slice(6, 11)
    group = problem.case.H // problem.case.H_KV
    mean = np.repeat(problem.v.astype(float).mean(axis=2, keepdims=True), group, axis=1)
    wide = np.asarray(problem.mask, float)
    assert len(np.unique(wide[0, 0, rows, 0])) == (2 if dtype == "float16" else 5)
    np.testing.assert_allclose(
        truth.results["out"][:, :, rows], mean.repeat(5, axis=2), rtol=1e-9, atol=1e-12
    )
    # Each key gets 1 / n of the gradient, in one of the cases.
    dout = problem.dout[:, :, rows].astype(float)
    assert (name == "hidden-rows") == dout.any()
    others = replace(problem, dout=problem.dout.copy(), known={})
    others.dout[:, :, rows] = 0
    share = truth.results["dv"] - truth_of(others).results["dv"]
    equal = dout.sum(axis=2).reshape(*problem.k.shape[:2], group, -1).sum(axis=2)[:, :, None] / 37
    np.testing.assert_allclose(share, equal.repeat(37, axis=2), rtol=1e-6, atol=1e-9)
    assert all((limit < 1).all() for limit in (truth.limits["out"], truth.limits["dv"]))


@pytest.mark.parametrize("case", ["dead-rows", "minus-infinity"])
def test_dead_rows_are_a_separate_kind(case: str) -> None:
    assert drawn(case).q_kinds.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("case", ["random-mask", "callable-mask", "padding-mask", "gaussian"])
def test_live_rows_are_one_kind(case: str) -> None:
    assert set(drawn(case).q_kinds) == {0}


def test_mask_of_minus_infinity_and_0_only() -> None:
    mask = drawn("minus-infinity").mask
    assert isinstance(mask, np.ndarray)
    assert set(np.unique(mask)) == {-np.inf, 0.0}


def test_callable_mask_is_consistent_for_any_indices() -> None:
    problem = drawn("callable-mask")
    assert callable(problem.mask)
    whole = seen(problem)
    for b, h, i, j in ((0, 0, 0, 0), (1, 1, 8, 39), (0, 1, 3, 17)):
        one = problem.mask(*(np.array(n) for n in (b, h, i, j)))
        assert one == whole[b, h, i, j]
    assert all((whole.take(0, n) != whole.take(1, n)).any() for n in range(3))


# Scores.


def test_scores_reach_plus_and_minus_600() -> None:
    s = scores(drawn("scores-600"))
    assert (s.max(axis=-1) > 590).all()
    assert (s.min(axis=-1) < -590).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_range_of_the_case(dtype: str) -> None:
    for name in ("lse-low", "lse-high"):
        p = drawn(name, dtype).astype(np.float64)
        lse = full_attention(p.q, p.k, p.v, scale=p.scale)[1]
        assert (lse < -750).all() if name == "lse-low" else (lse > 750).all()


def test_weights_of_key_quarters_fall_by_e_8() -> None:
    problem = drawn("gaps-between-shards")
    s = scores(problem).reshape(2, 17, 4, 10)
    assert problem.kv_kinds.tolist() == [n for n in range(4) for _ in range(10)]
    weight = np.log(np.exp(s).sum(axis=-1)).mean(axis=(0, 1))  # each with a spread of about 0.05
    np.testing.assert_allclose(-np.diff(weight), 8, atol=0.5)


def test_needle_is_the_last_key() -> None:
    problem = drawn("needle-in-the-last-shard")
    s = scores(problem)
    above = s[..., -1] - s[..., :-1].max(axis=-1)
    looks = problem.q_kinds == 1
    assert looks.tolist() == [bool(n % 2) for n in range(17)]
    assert (above[:, :, looks] > 100).all()
    assert (above[:, :, ~looks] < 20).all()


def test_values_near_1000_keep_their_differences() -> None:
    v = drawn("offset-values", "float32").v
    assert abs(v.mean() - 1000) < 1
    assert 8 < v.std() < 32  # over a few of bfloat16's steps of 4


# Lengths, heads, memory.


def test_lengths_match_the_reasons() -> None:
    ragged = case_of("ragged-lengths")
    assert ragged.S_Q % 2
    assert ragged.S_KV % 2
    assert case_of("one-query").S_Q == case_of("one-key").S_KV == 1
    assert case_of("fewer-keys-than-shards").S_KV < 4
    assert case_of("long-keys").S_KV == 16000
    assert case_of("grouped-heads").H // case_of("grouped-heads").H_KV == 3
    assert case_of("one-kv-head").H_KV == 1 < case_of("one-kv-head").H
    assert case_of("head-size-1").D == 1
    assert case_of("head-size-1").scale != 1
    assert case_of("odd-head-size").D % 2
    assert case_of("value-size").D_V != case_of("value-size").D


def test_zero_stride_repeats_over_heads() -> None:
    problem = drawn("stride-0", "bfloat16")
    for x in (problem.k, problem.v, problem.dout):
        assert (x == x[:, :1]).all()
    assert (problem.q != problem.q[:, :1]).any()


# Suites.


def test_case_names_are_unique() -> None:
    full = suite_of("full")
    names = [case.name for case in full]
    assert len(set(names)) == len(names)
    assert all(case_of(case.name) == case for case in full)
    assert set(suite_of("quick")) < set(full)
    for bad in ("nothing", "", "gaussian.larger"):
        with pytest.raises(ValueError, match=r"^case: expected one that --list shows, got"):
            case_of(bad)
    for suite in ("fast", None, ["quick"]):
        with pytest.raises(ValueError, match=r"^suite: expected one of quick, full, got"):
            suite_of(suite)  # type: ignore[arg-type]


def test_sizes_of_quick_and_large_cases() -> None:
    for case in suite_of("quick"):
        number = case.B * case.H * case.S_Q * case.S_KV
        assert number <= (2**17 if case.group == "combinations" else 10_000)
        if case.grows:
            assert large(case).S_KV > 256
            assert large(case).S_KV % 2
            assert large(case).S_Q % 2
            assert large(case) in suite_of("full")


def test_bfloat16_without_ml_dtypes_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(InputError, match=r"^bfloat16: needs ml_dtypes: pip install ml_dtypes"):
        draw(Case("any", "", ""), "bfloat16")


def test_astype_converts_additive_masks_only() -> None:
    for name, dtype in (("finite-minimum", np.float64), ("random-mask", bool)):
        mask = drawn(name, "bfloat16").astype(np.float64).mask
        assert isinstance(mask, np.ndarray)
        assert mask.dtype == dtype


# Cases of users.


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": "foo"}, "case.data: expected one of 'gaussian', .*, got 'foo'"),
        ({"mask": "foo"}, says("case.mask", "'none'", "'foo'")),
        ({"memory": "foo"}, says("case.memory", "'contiguous'", "'foo'")),
        ({"calls": "foo"}, says("case.calls", "''", "'foo'")),
        ({"D": 0}, "case.D: expected at least 1, got 0"),
        ({"S_Q": 2.5}, says("case.S_Q", 1, 2.5)),
        ({"H": 5, "H_KV": 2}, "case.H_KV: expected a divisor of H = 5, got 2"),
    ],
)
def test_bad_case_raises(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        draw(replace(case_of("gaussian"), **change), "float32")


def test_case_and_dtype_of_wrong_type_raise() -> None:
    with pytest.raises(TypeError, match=r"case: expected a Case, as of case_of.name., got 'gaus"):
        draw("gaussian", "float32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype: expected one of float64, .*, got 'float33'"):
        draw(case_of("gaussian"), "float33")
