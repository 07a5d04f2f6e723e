"""How far a right result may be from the truth: derived from the arithmetic, never tuned.

Let u be the unit roundoff of the accumulator and w that of the dtype of inputs and outputs.

A score is a sum of D products, off by at most (D + 2) u times the largest |q||k| scale it can have,
`largest_score`.  (Adding a mask or a shift rounds to the score's own size, which that bounds too.)
An absolute error in a score, or in lse, is a relative error in the probability exp(s - lse).  The
sums that follow run over S_KV keys or S_Q queries, add at most about sqrt(n) u by random walk (n u
at worst) relative to the sum of magnitudes, the result's size.  The output is rounded once, w.  In
half precision the backward is given an out that was rounded to w, which moves delta, and so a
gradient, by w times its size.

    |result - truth| <= (2 (D + 2) largest_score u + 4 (sqrt(n) + 8) u + 2 w) size
                                                                        + n tiny factor + least

The 2 before the first term is for s and lse both; the 4 before the second is four standard
deviations; 8 covers the handful of operations an element passes through beside the sums, exp and
the merges.  lse itself has size 1 and rounds to its own magnitude, at most largest_score + log n.
The last two terms are underflow: a probability below the smallest normal number, tiny, may be lost,
with whatever it would have been multiplied by, and no output is finer than the least number above 0
of its dtype.
"""

from collections.abc import Callable
from math import log, sqrt

import numpy as np

from tests.cases import Case, Problem
from tests.naive import Array, Truth

LEAST = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
}
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def limits(case: Case, truth: Truth, dtype: str, accumulator: str) -> dict[str, Array]:
    """Return, for each result by name, how far from the truth each of its elements may be."""
    u = UNIT[accumulator]
    n = max(case.S_Q, case.S_KV, 1)
    relative = 2 * (case.D + 2) * truth.largest_score * u + 4 * (sqrt(n) + 8) * u
    rounding = dict.fromkeys(truth.results, 2 * UNIT[dtype])
    rounding["lse"] = 2 * u * (truth.largest_score + log(n) + 1)
    underflow = n * float(np.finfo(accumulator).tiny) * truth.largest_factor + LEAST[dtype]
    return {
        name: (relative + rounding[name]) * size + underflow for name, size in truth.sizes.items()
    }


def merged(u: float, merges: int, largest_lse: float) -> float:
    """Return how far off merging may be: of lse absolutely, of out relative to its largest value.

    A merge rounds lse to its own magnitude, and again when a side's lse is taken from it; either is
    a relative error of the weights.  What remains, log1p, exp, two products and a sum, is 8 u.
    """
    return merges * (2 * largest_lse + 8) * u


def central_difference(
    problem: Problem, truth: Truth, limit: dict[str, Array], step: float, rate: float,
    value_rate: float = 0.0,
) -> float:  # fmt: skip
    """Return how far (loss(step) - loss(-step)) / (2 step) may be from the derivative of the loss.

    The loss is sum(dout out) + sum(dlse lse).  As the argument moves, every score does at a
    constant speed of at most `rate`, every value at one of at most `value_rate`.  The third
    derivative of lse is then the third cumulant of the speeds under the softmax, at most
    (2 rate)^3; that of out is their fourth cumulant with the values, E[v a^3] - 3 E[v a] E[a^2] of
    centred v and a, at most 4 (2 max|v|) (2 rate)^3, and 3 times the third with the values' own
    speeds, at most (2 value_rate) (2 rate)^2.  Taylor's remainder is a sixth of that times step^2.
    To it comes the rounding of two losses, each as far off as its terms, over 2 step.
    """
    dout, dlse = abs(problem.dout.astype(np.float64)).sum(), abs(problem.dlse).sum()
    largest = abs(problem.v.astype(np.float64)).max(initial=0.0) + step * value_rate
    third = 4 * 2 * largest * (2 * rate) ** 3 + 3 * 2 * value_rate * (2 * rate) ** 2
    remainder = (third * dout + (2 * rate) ** 3 * dlse) * step**2 / 6
    terms = (limit["out"] * abs(problem.dout.astype(np.float64))).sum()
    terms += (limit["lse"] * abs(problem.dlse)).sum()
    return float(remainder + terms / step)


def projected(
    product: Callable[[Array, Array], Array], limit: Array, size: Array, factor: Array, n: int
) -> Array:
    """Return how far ``product(x, factor)``, in fp64 and a sum of n terms, may be from the truth.

    `limit` and `size` are those of x: its own error is carried through, and the sum adds what a sum
    adds in `limits`.
    """
    return product(limit, abs(factor)) + summed(UNIT["float64"], n) * product(size, abs(factor))


def summed(u: float, n: int) -> float:
    """Return how far off a sum of n products may be, relative to the sum of their magnitudes."""
    return 4 * (sqrt(n) + 8) * u
