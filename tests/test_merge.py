"""Joining two attention results, in every implementation and kind of array."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvxattn import mpi_impl, reference, torch_impl
from tests import fake_cupy
from tests.backends import host, tensor
from tests.cases import Case
from tests.judge import worst_ratios
from tests.naive import Array, naive_attention
from tests.tolerances import UNIT, merged

Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Merge:
    """A merge from NumPy arrays to NumPy arrays, and the dtype that it works in."""

    name: str
    function: Callable[..., Any]
    dtype: str
    there: Callable[..., Any] | None = None  # from a NumPy array

    def __call__(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> Pair:
        given = [np.asarray(x, self.dtype) for x in (out_a, lse_a, out_b, lse_b)]
        for x in given:
            x.flags.writeable = False
        there = [self.there(x) for x in given] if self.there else given
        out, lse = (host(x) for x in self.function(*there))
        for x, y in zip(given, there, strict=True):
            assert np.array_equal(x, host(y), equal_nan=True)
        assert (out.dtype, lse.dtype) == (np.dtype(self.dtype),) * 2
        return out, lse


MERGES = [
    Merge("reference", reference.merge, "float64"),
    Merge("mpi, float64", mpi_impl.merge, "float64"),
    Merge("mpi, float32", mpi_impl.merge, "float32"),
    Merge("mpi, device, float64", mpi_impl.merge, "float64", fake_cupy.asarray),
    Merge("mpi, device, float32", mpi_impl.merge, "float32", fake_cupy.asarray),
    Merge("torch, float64", torch_impl.merge, "float64", tensor),
    Merge("torch, float32", torch_impl.merge, "float32", tensor),
]
merges = pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.name)
examples = settings(max_examples=40)


def results(seed: int, size: float, dead: float = 0.0) -> Pair:
    """Return a random result for 6 rows of 3 values; some rows see nothing."""
    rng = np.random.default_rng(seed)
    out, lse = rng.standard_normal((2, 6, 3)), size * rng.uniform(-1, 1, (2, 6))
    nothing = rng.random((2, 6)) < dead
    out[nothing], lse[nothing] = 0.0, -np.inf
    return np.float32(out), np.float32(lse)  # exact in every dtype


def close(merge: Merge, a: Pair, b: Pair, count: int, size: float) -> bool:
    """Whether two ways of joining `count` results each are equal but for rounding."""
    off = 2 * merged(UNIT[merge.dtype], count - 1, size + np.log(count))
    largest = 5.0  # of 36 normal numbers, and no mean is larger
    lse_a, lse_b = (np.where(np.isfinite(x), x, 0.0) for x in (a[1], b[1]))
    return bool(
        np.array_equal(a[1] == -np.inf, b[1] == -np.inf)
        and (abs(lse_a - lse_b) <= off).all()
        and (abs(a[0] - b[0]) <= off * largest).all()
    )


@merges
@pytest.mark.parametrize("first", [0, 1, 40, 96, 97])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("mask", ["none", "dead rows", "additive"])
def test_joins_to_attention_over_the_union(
    merge: Merge, first: int, shift: float, mask: str
) -> None:
    problem = Case("union", B=2, mask=mask, shift=shift, dtype=merge.dtype).make()
    parts = []
    for keys in (slice(0, first), slice(first, 97)):
        part = None if problem.mask is None else problem.mask[..., keys]
        truth = naive_attention(
            problem.q, problem.k[:, :, keys], problem.v[:, :, keys], problem.scale, part,
            problem.dout, problem.dlse,
        )  # fmt: skip
        parts += [truth.results["out"], truth.results["lse"]]
    out, lse = merge(*parts)
    assert max(worst_ratios(problem, {"out": out, "lse": lse}).values()) <= 1


@merges
@examples
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1.0, 100.0, 1e4]), dead=st.floats(0, 1))
def test_is_associative(merge: Merge, seed: int, size: float, dead: float) -> None:
    a, b, c = (results(seed + i, size, dead) for i in range(3))
    assert close(merge, merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)), 3, size)


@merges
@examples
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1.0, 100.0, 1e4]), dead=st.floats(0, 1))
def test_is_commutative(merge: Merge, seed: int, size: float, dead: float) -> None:
    a, b = (results(seed + i, size, dead) for i in range(2))
    assert close(merge, merge(*a, *b), merge(*b, *a), 2, size)


@merges
@examples
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1.0, 1e4]), dead=st.floats(0, 1))
def test_empty_partial_is_the_identity(merge: Merge, seed: int, size: float, dead: float) -> None:
    a = results(seed, size, dead)
    nothing = np.zeros_like(a[0]), np.full_like(a[1], -np.inf)
    for joined in (merge(*a, *nothing), merge(*nothing, *a)):
        assert np.array_equal(joined[0], a[0])
        assert np.array_equal(joined[1], a[1])


@merges
def test_merge_of_two_empty_partials_is_empty(merge: Merge) -> None:
    nothing = np.zeros((2, 3)), np.full(2, -np.inf)
    out, lse = merge(*nothing, *nothing)
    assert np.array_equal(out, nothing[0])
    assert np.array_equal(lse, nothing[1])


@merges
@pytest.mark.parametrize("level", [-1e4, -100.0, 0.0, 88.0, 1e4])
@pytest.mark.parametrize("gap", [0.0, 1.0, -1.0, 16.0, 1e4])
def test_merge_is_exact_at_any_lse_level(merge: Merge, level: float, gap: float) -> None:
    # b outweighs a by exp(gap); level and gap are exact in fp32.
    out, lse = merge(np.ones((1, 1)), np.array([level]), np.zeros((1, 1)), np.array([level + gap]))
    weight = 1 / (1 + np.exp(min(gap, 700.0)))
    off = merged(UNIT[merge.dtype], 1, abs(level) + abs(gap) + 1)
    assert abs(float(out[0, 0]) - weight) <= off
    assert abs(float(lse[0]) - np.logaddexp(level, level + gap)) <= off


@merges
@pytest.mark.parametrize("which", ["out_a", "lse_a", "out_b", "lse_b"])
def test_nan_stays_in_its_row(merge: Merge, which: str) -> None:
    arrays = [x.astype(merge.dtype) for x in results(1, 50.0) + results(2, 50.0)]
    given = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), arrays, strict=True))
    clean = merge(*given.values())
    given[which] = given[which].copy()
    given[which][1, 2] = np.nan
    out, lse = merge(*given.values())
    assert np.isnan(out[1, 2]).all()
    assert np.isnan(lse[1, 2]) == which.startswith("lse")
    others = np.ones((2, 6), bool)
    others[1, 2] = False
    assert np.array_equal(out[others], clean[0][others])
    assert np.array_equal(lse[others], clean[1][others])
