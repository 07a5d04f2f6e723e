"""Derive the limit for a result, and judge it.

For every result, and for every kind of row in it, in the L2 norm over those rows:

    |result - truth|  <=  2 E  +  u |truth|  +  4 a |size|

E is the error that the reference itself makes with the dtype's roundings (`rounding_model`), the
largest of several ways to compute; u the unit roundoff of the dtype in which the result is
returned; a that of the accumulator; size the result if nothing in its sums cancelled and every
probability were larger by the size of its score: p (1 + scale |q| |k| + |mask|) |v| for out, where
|mask| counts only beside a score that it can round, which 0 is not.  The last two terms are floors,
for where E happens to be small: a result is rounded once when it is stored, its terms a few times
on the way, and an absolute error in a score is a relative one in its probability.  The size of lse
is 1 + scale |q| |k| + |mask| + |lse|: every merge rounds it to its own size.

In fp64 there is nothing more exact to compare with: E is measured in fp32, to whose unit roundoff
every rounding is proportional, and divided by 2**29.

NaN and infinities must be where the truth has them, and nowhere else.

The idea of measuring a kernel against a low-precision reference's own error is from the tests of
FlashAttention; its ratio is reported beside ours.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem, draw, masked, sum_groups
from lvxattn.check.cases import Case
from lvxattn.check.rounding_model import PLAIN, WAYS, rounded_attention
from lvxattn.common.validation import accumulator

Array = npt.NDArray[Any]

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# The smallest exponent of a normal number: below it, steps stay as they are.
_LEAST_EXPONENT = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}
RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Truth:
    """The correct results, and how far from them a result may be.

    Attributes
    ----------
    results : dict
        float64 arrays, by name: out, lse, dq, dk, dv.
    limits : dict
        By name, the largest allowed L2 norm of an error, for each kind of row.
    scales : dict
        By name, the norm that errors are reported relative to, for each kind of row.
    plain : dict
        By name, the largest absolute error of attention with everything in the dtype.
    """

    results: dict[str, Array]
    limits: dict[str, Array]
    scales: dict[str, Array]
    plain: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """The judgement of one result.

    Attributes
    ----------
    name : str
        out, lse, dq, dk or dv.
    error, limit : float
        Relative L2 norms, of the worst kind of row.
    ratio : float
        error / limit: above 1 is wrong, infinite where NaN and infinities do not agree.
    what : str
        What is wrong, unless it is only the size of the error.
    index : tuple of int
        Of the largest absolute error.
    got, expected : float
        The elements there.
    max_abs, ulps : float
        The largest absolute error; the largest in steps of the dtype, at the element or, where that
        is smaller, at the usual size of elements.
    flash : float
        The largest absolute error over that of attention with everything in the dtype;
        FlashAttention's tests allow 2.
    """

    name: str
    error: float
    limit: float
    ratio: float
    what: str
    index: tuple[int, ...]
    got: float
    expected: float
    max_abs: float
    ulps: float
    flash: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit."""
        return self.ratio <= 1


def truth_of(problem: Problem) -> Truth:
    """Compute the correct results of a problem, and how far from them a result may be."""
    return _truth_of(problem, _measured(problem))


@lru_cache(maxsize=64)  # a suite in two dtypes: other cuts among ranks and diagnoses reuse it
def truth_for(case: Case, dtype: str, seed: int) -> Truth:
    """Return `truth_of` the arrays drawn for a case, which must not be modified."""
    if dtype == "float32":
        return _truth_of(*_single(case, seed))
    return truth_of(draw(case, dtype, seed))


@dataclass(frozen=True)
class _Measured:
    """The results of a problem, their sizes, and the errors of the rounded reference."""

    results: dict[str, Array]
    size: dict[str, Array]
    errors: dict[str, Array]
    plain: dict[str, float]


@np.errstate(all="ignore")  # probabilities underflow
def _measured(problem: Problem) -> _Measured:
    results, sizes = _exactly(problem)
    size = {name: norms(problem, name, x) for name, x in sizes.items()}
    if problem.dtype == "float64":
        twin = _single(problem.case, problem.seed)[1]
        grown = {name: _over(size[name], twin.size[name]) * 2.0**-29 for name in RESULTS}
        errors = {name: grown[name] * twin.errors[name] for name in RESULTS}
        plain = {name: twin.plain[name] * 2.0**-29 for name in RESULTS}
    else:
        errors, plain = _errors(problem, results)
    return _Measured(results, size, errors, plain)


@lru_cache(maxsize=8)  # a case in float64 is followed by that in float32
def _single(case: Case, seed: int) -> tuple[Problem, _Measured]:
    problem = draw(case, "float32", seed)
    return problem, _measured(problem)


@np.errstate(all="ignore")
def _truth_of(problem: Problem, measured: _Measured) -> Truth:
    results, size, errors = measured.results, measured.size, measured.errors
    unit = UNIT[accumulator(problem.dtype)]
    own = {name: norms(problem, name, x) for name, x in results.items()}
    limits = {
        name: 2 * errors[name]
        + (unit if name == "lse" else UNIT[problem.dtype]) * own[name]
        + 4 * unit * size[name]
        for name in RESULTS
    }
    scales = {name: np.where(own[name] > limits[name], own[name], size[name]) for name in RESULTS}
    return Truth(results, limits, scales, measured.plain)


@np.errstate(all="ignore")  # a wrong result may be of any size
def judge(name: str, got: Array, problem: Problem, truth: Truth) -> Verdict:
    """Judge one result.

    Parameters
    ----------
    name : str
        out, lse, dq, dk or dv.
    got : array
        Of the correct shape, in float64.
    problem : Problem
    truth : Truth
        Of that problem.

    Returns
    -------
    Verdict
    """
    want = truth.results[name]
    what = _pattern(got, want)
    error = difference(got, want)
    by_kind = norms(problem, name, error)
    limit = truth.limits[name]
    ratios = _ratios(by_kind, limit)
    kind = int(np.argmax(ratios))
    index = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    if what:  # point at an element where the patterns differ
        index = tuple(int(i) for i in np.argwhere(disagree(got, want))[0])
    dtype = accumulator(problem.dtype) if name == "lse" else problem.dtype
    usual = float(truth.scales[name][kind])
    largest, plain = float(error.max(initial=0.0)), truth.plain[name]
    return Verdict(
        name,
        error=float(by_kind[kind] / _safe(truth.scales[name])[kind]),
        limit=float(limit[kind] / _safe(truth.scales[name])[kind]),
        ratio=float("inf") if what else float(ratios[kind]),
        what=what,
        index=index,
        got=float(got[index]),
        expected=float(want[index]),
        max_abs=largest,
        ulps=float((error / _steps(np.maximum(abs(want), usual), dtype)).max(initial=0.0)),
        flash=largest / plain if plain else (float("inf") if largest else 0.0),
    )


@np.errstate(all="ignore")
def ratio_of(name: str, got: Array, problem: Problem, truth: Truth) -> float:
    """Return the ratio of `judge`'s verdict, in a fraction of its time."""
    if disagree(got, truth.results[name]).any():
        return float("inf")
    by_kind = norms(problem, name, difference(got, truth.results[name]))
    return float(_ratios(by_kind, truth.limits[name]).max())


def _ratios(by_kind: Array, limit: Array) -> Array:
    return np.where(by_kind == 0, 0.0, np.where(limit > 0, by_kind / _safe(limit), np.inf))


def norms(problem: Problem, name: str, x: Array) -> Array:
    """Return the root mean square of a result, for each kind of row; NaN and infinities count as 0.

    Parameters
    ----------
    problem : Problem
    name : str
        out, lse, dq, dk or dv.
    x : array
        The result, or anything of its shape.

    Returns
    -------
    (kinds,)
    """
    x = np.where(np.isfinite(x), abs(x), 0.0)
    kinds = problem.kv_kinds if name in ("dk", "dv") else problem.q_kinds
    found = []
    for kind in range(int(kinds.max(initial=0)) + 1):
        rows = x[:, :, kinds == kind]
        top = rows.max(initial=0.0)  # float64's largest number has no square
        found.append(top * np.sqrt(((rows / top) ** 2).mean()) if top else 0.0)
    return np.array(found)


def _exactly(problem: Problem) -> tuple[dict[str, Array], dict[str, Array]]:
    """Compute the results in fp64, and their sizes."""
    # Imported now: the oracle itself depends on no implementation.
    from lvxattn.reference.full_attention import full_attention, full_attention_backward

    wide = problem.astype(np.float64)
    q, k, v, dout, scale = wide.q, wide.k, wide.v, wide.dout, wide.scale
    scale_size = abs(scale)
    out, lse = full_attention(q, k, v, scale=scale, mask=wide.mask)
    out, lse = problem.known.get("out", out), problem.known.get("lse", lse)
    gradients = full_attention_backward(dout, q, k, v, out, lse, scale=scale, mask=wide.mask)
    results = dict(zip(RESULTS, (out, lse, *gradients), strict=True))

    # Attention of magnitudes: no term of a sum cancels another.
    group = problem.case.H // problem.case.H_KV
    k_all, v_all = (np.repeat(x, group, axis=1) for x in (k, v))
    mask = wide.dense_mask()
    s = masked(scale * q @ k_all.swapaxes(-1, -2), mask)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - np.where(top == -np.inf, 0.0, top))
    total = p.sum(axis=-1, keepdims=True)
    p /= np.where(total == 0, 1.0, total)
    score = scale_size * abs(q) @ abs(k_all).swapaxes(-1, -2)
    bias: Any = 0.0
    if mask is not None and mask.dtype != bool:
        # A score of 0 is exact beside any mask.
        bias = np.where(np.isfinite(mask) & (score > 0), abs(mask), 0.0)
    # A merge rounds lse to its own size, which exceeds a score's where keys are many.
    lse_size = 1 + np.where(p > 0, score + bias, 0.0).max(axis=-1, initial=0.0)
    lse_size = lse_size + np.where(np.isfinite(lse), abs(lse), 0.0)
    larger = p * (1 + score + bias)
    out_size = larger @ abs(v_all)
    # ds = p (dp - delta) has the errors of p, and those of out in delta.
    dp = abs(dout) @ abs(v_all).swapaxes(-1, -2)
    delta, larger_delta = ((abs(dout) * (x @ abs(v_all))).sum(axis=-1) for x in (p, larger))
    ds = larger * (dp + delta[..., None]) + p * larger_delta[..., None]

    sizes = {
        "out": out_size,
        "lse": lse_size,
        "dq": scale_size * ds @ abs(k_all),
        "dk": scale_size * sum_groups(ds.swapaxes(-1, -2) @ abs(q), problem.case.H_KV),
        "dv": sum_groups(larger.swapaxes(-1, -2) @ abs(dout), problem.case.H_KV),
    }
    return results, sizes


def _errors(
    problem: Problem, results: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, float]]:
    """Return the error of the rounded reference, and the largest one with all in the dtype."""
    errors = {name: norms(problem, name, np.zeros_like(results[name])) for name in RESULTS}
    for way in WAYS:
        for name, low in rounded_attention(problem, way).items():
            error = norms(problem, name, difference(low, results[name]))
            errors[name] = np.maximum(errors[name], error)
    plain = rounded_attention(problem, PLAIN)
    largest = {
        name: float(difference(plain[name], results[name]).max(initial=0.0)) for name in RESULTS
    }
    return errors, largest


def difference(got: Array, want: Array) -> Array:
    """Return |got - want|; 0 where either is not finite."""
    finite = np.isfinite(got) & np.isfinite(want)
    return np.asarray(abs(np.where(finite, got, 0.0) - np.where(finite, want, 0.0)))


def disagree(got: Array, want: Array) -> Array:
    """Return where one is NaN or infinite and the other is not the same."""
    finite = np.isfinite(got) & np.isfinite(want)
    return ~np.asarray(finite | (got == want) | (np.isnan(got) & np.isnan(want)))


def _pattern(got: Array, want: Array) -> str:
    """Describe NaN and infinities that are out of place or missing; empty if there are none."""
    wrong = disagree(got, want)
    if not wrong.any():
        return ""
    parts = {
        "NaN": np.isnan(got),
        "inf": got == np.inf,
        "-inf": got == -np.inf,
        "finite": np.isfinite(got),
    }
    found = [f"{(wrong & where).sum()} {name}" for name, where in parts.items()]
    found = [text for text in found if not text.startswith("0 ")]
    return f"{', '.join(found)} of {got.size} elements where they should not be"


def _steps(x: Array, dtype: str) -> Array:
    """Return the distance between neighbouring numbers of the dtype at x."""
    _, exponent = np.frexp(np.where(np.isfinite(x), x, 0.0))
    exponent = np.where(x == 0, _LEAST_EXPONENT[dtype], exponent - 1)
    exponent = np.maximum(exponent, _LEAST_EXPONENT[dtype])
    return np.asarray(np.ldexp(2 * UNIT[dtype], exponent))


def _safe(x: Array) -> Array:
    return np.where(x > 0, x, 1.0)


def _over(x: Array, y: Array) -> Array:
    return np.where(y > 0, x / _safe(y), 1.0)
