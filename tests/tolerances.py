"""How far a right result may be from the truth: derived from the arithmetic, never tuned.

Let u be the unit roundoff of the accumulator and w that of the dtype of inputs and outputs.

A score is a sum of D products, off by at most (D + 2) u times the largest |q||k| scale it can have,
`largest_score`.  (Adding a mask or a shift rounds to the score's own size, which that bounds too.)
An absolute error in a score, or in lse, is a relative error in the probability exp(s - lse).  The
sums that follow run over S_KV keys or S_Q queries, add at most about sqrt(n) u by random walk (n u
at worst) relative to the sum of magnitudes, the result's size.  The output is rounded once, w.  In
half precision the backward is given an out that was rounded to w, which moves delta, and so a
gradient, by w times its size.

    |result - truth| <= (2 (D + 2) largest_score u + 4 (sqrt(n) + 8) u + 2 w) size + n tiny factor

The 2 before the first term is for s and lse both; the 4 before the second is four standard
deviations; 8 covers the handful of operations an element passes through beside the sums, exp and
the merges.  lse itself has size 1 and rounds to its own magnitude, at most largest_score + log n.
The last term is underflow: a probability below the smallest normal number, tiny, may be lost, with
whatever it would have been multiplied by.
"""

from math import log, sqrt

import numpy as np

from tests.cases import Case
from tests.naive import Array, Truth

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def limits(case: Case, truth: Truth, dtype: str, accumulator: str) -> dict[str, Array]:
    """Return, for each result by name, how far from the truth each of its elements may be."""
    u = UNIT[accumulator]
    n = max(case.S_Q, case.S_KV, 1)
    relative = 2 * (case.D + 2) * truth.largest_score * u + 4 * (sqrt(n) + 8) * u
    rounding = dict.fromkeys(truth.results, 2 * UNIT[dtype])
    rounding["lse"] = 2 * u * (truth.largest_score + log(n) + 1)
    underflow = n * float(np.finfo(accumulator).tiny) * truth.largest_factor
    return {
        name: (relative + rounding[name]) * size + underflow for name, size in truth.sizes.items()
    }
