r"""Is the result right?  Sampled rows against `two_pass`, to within what rounding allows.

How far off a result may be is derived, not tuned.  With u the unit roundoff of the sums' dtype and
w that of the result's, a score is off by at most (D + 2) u times `score`, the largest there could
be if nothing in it cancelled: |scale| max |q| max |k| + max |mask|.  That is a relative error of
its probability; lse is off by as much.  Sums over n terms add sqrt(n) u by random walk, of which 4
standard deviations are allowed, and the handful of other operations 8 u.  With `size` what the
result would be if nothing in it cancelled:

    |error| <= (2 (D + 2) score u + 4 (sqrt(n) + 8) u + 2 w) size

and underflow: n times the smallest normal number times the largest factor of a probability, and the
smallest number of the result's dtype.  lse has size 1 and rounds to its own magnitude.
"""

from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from lvxattn.reference.run.problem import Problem, Share
from lvxattn.reference.run.tensors import Array
from lvxattn.reference.run.two_pass import Point, Summed, TwoPass
from lvxattn.reference.validation import Communicator, accumulator

SAMPLES = 16
_UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
}


@dataclass(frozen=True)
class Check:
    """How one result compares.

    Attributes
    ----------
    name : str
    rows : int
        How many rows were compared.
    error, allowed : float
        The error and its limit, where the error is largest beside its limit.
    """

    name: str
    rows: int
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it holds; NaN does not."""
        return bool(self.error <= self.allowed)


def check_results(
    problem: Problem,
    share: Share,
    results: dict[str, Array],
    comm: Communicator,
    *,
    scale: float,
    seed: int,
) -> list[Check]:
    """Compare sampled rows of out, lse and, where there are, dq, dk and dv.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    problem : Problem
    share : Share
        This rank's.
    results : dict
        This rank's parts, NumPy arrays, by name.
    comm : communicator
    scale : float
    seed : int
        Which rows.

    Returns
    -------
    list of Check
        The same on all ranks.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is checked may be anything
        return _check(problem, share, TwoPass(share, results, comm, scale), seed)


def _check(problem: Problem, share: Share, truth: TwoPass, seed: int) -> list[Check]:
    results, comm = truth.results, truth.comm
    limits = _Limits(problem, truth)
    rng = np.random.default_rng(seed)
    B, H, S_Q, _ = problem.shapes["q"]
    H_KV, S_KV = problem.shapes["k"][1:3]
    queries, keys = _sample(rng, B, H, S_Q, comm.size), _sample(rng, B, H_KV, S_KV, comm.size)
    true = truth.of_queries(queries)
    got = truth.pick({name: results[name] for name in true}, queries, share.rows)
    if "dout" in problem.shapes and "dq" in results:
        of_keys = truth.of_keys(keys)
        true |= of_keys
        got |= truth.pick({name: results[name] for name in of_keys}, keys, share.keys)
    return [_compare(name, got[name], true[name], limits) for name in true]


def _sample(rng: np.random.Generator, B: int, H: int, length: int, P: int) -> list[Point]:
    """Pick places from all over a sequence, so that every rank's share has some."""
    count = min(max(SAMPLES, 2 * P), length)
    return [
        (int(rng.integers(B)), int(rng.integers(H)), int(length * (n + rng.random()) / count))
        for n in range(count)
    ]


class _Limits:
    """How far off each element of a result may be."""

    def __init__(self, problem: Problem, truth: TwoPass) -> None:
        self.dtype, wide = problem.dtype, accumulator(problem.dtype)
        D = problem.shapes["q"][3]
        n = max(problem.shapes["q"][2], problem.shapes["k"][2], 1)
        u, score = _UNIT[wide], truth.largest_score
        sums = 2 * (D + 2) * score * u + 4 * (sqrt(n) + 8) * u
        self.relative = sums + 2 * _UNIT[self.dtype]
        self.lse = sums + 2 * u * (score + log(n) + 1)
        self.underflow = n * float(np.finfo(wide).tiny) * truth.largest_factor * D
        self.underflow += _SMALLEST[self.dtype]

    def of(self, name: str, size: Array) -> Array:
        """Return the limits of a result of this size."""
        return self.lse * size if name == "lse" else self.relative * size + self.underflow


def _compare(name: str, got: Array, true: Summed, limits: _Limits) -> Check:
    finite = np.isfinite(true.value)
    allowed = np.where(finite, limits.of(name, true.size), 0.0)
    error = abs(got - true.value)
    # -inf, where no key is visible, must be so in both.  NaN is never right, wherever it came from.
    same = got == true.value
    error = np.where(same, 0.0, np.where(np.isfinite(got) & finite, error, np.inf))
    if not error.size:
        return Check(name, len(error), 0.0, 0.0)
    worst = np.argmax(np.where(error == 0, 0.0, error / np.maximum(allowed, 1e-300)))
    return Check(name, len(error), float(error.flat[worst]), float(allowed.flat[worst]))
