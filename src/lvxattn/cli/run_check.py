r"""Compare sampled rows of a result with `two_pass`, to within the rounding errors of a right one.

The tolerance is derived, not tuned, and separate for each row (`rounding`): a row that a mask hides
with a large number must not loosen that of others.  -inf, where no key is visible, must be in both,
and NaN is never right.
"""

from dataclasses import dataclass

import numpy as np

from lvxattn.cli.rounding import Rounding
from lvxattn.cli.run_problem import Problem, Share
from lvxattn.cli.tensors import Array
from lvxattn.cli.two_pass import Bounded, Point, TwoPass
from lvxattn.common.validation import Communicator

SAMPLES = 48


@dataclass(frozen=True)
class Check:
    """The comparison of one result.

    Attributes
    ----------
    name : str
    rows : int
        Number of rows compared.
    error, allowed : float
        The error and its limit, where their ratio is largest.
    """

    name: str
    rows: int
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return bool(self.error <= self.allowed)


def check_results(
    problem: Problem,
    share: Share,
    results: dict[str, Array],
    comm: Communicator,
    *,
    scale: float,
    seed: int,
    gpu: bool = False,
) -> list[Check]:
    """Compare sampled rows of out, lse and, if present, dq, dk and dv.

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
        Chooses the rows.
    gpu : bool
        Whether the results were computed on GPUs.

    Returns
    -------
    list of Check
        The same on all ranks.
    """
    D, D_V = problem.shapes["q"][3], problem.shapes["v"][3]
    rounding = Rounding(problem.dtype, D, D_V, problem.shapes["k"][2], gpu)
    with np.errstate(all="ignore"):  # results may be anything
        return _check(problem, share, TwoPass(share, results, comm, scale, rounding), seed)


def _check(problem: Problem, share: Share, truth: TwoPass, seed: int) -> list[Check]:
    results, comm = truth.results, truth.comm
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
    return [_compare(name, got[name], true[name]) for name in true]


def _sample(rng: np.random.Generator, B: int, H: int, length: int, P: int) -> list[Point]:
    """Sample positions from the whole sequence, so that every rank's share has some."""
    count = min(max(SAMPLES, 2 * P), length)
    return [
        (int(rng.integers(B)), int(rng.integers(H)), int(length * (n + rng.random()) / count))
        for n in range(count)
    ]


def _compare(name: str, got: Array, true: Bounded) -> Check:
    finite = np.isfinite(true.value)
    allowed = np.where(finite, true.limit, 0.0)
    error = abs(got - true.value)
    # -inf, where no key is visible, must be in both; NaN is never right.
    same = got == true.value
    error = np.where(same, 0.0, np.where(np.isfinite(got) & finite, error, np.inf))
    if true.rows.size:
        mean = abs((got - true.value)[true.rows].mean())
        error, allowed = np.append(error, mean), np.append(allowed, true.of_mean)
    if not error.size:
        return Check(name, len(got), 0.0, 0.0)
    worst = np.argmax(np.where(error == 0, 0.0, error / np.maximum(allowed, 1e-300)))
    return Check(name, len(got), float(error.flat[worst]), float(allowed.flat[worst]))
