r"""Bound the rounding error of sums of attention, derived term by term for one row at a time.

With u the unit roundoff of the sums' dtype, w that of the result's, and a_j = |scale| |q| |k_j| the
score of a key without cancellation, the errors of a right kernel are

    error of                       of all keys alike, at most         of each key by itself
    a score, so p_j, relatively    4 u a_j + 2 u |s_j - top| + 4 u    u sqrt(D + 2) a_j
    p_j as a factor                                                   w
    dout v_j                       2 u |dout| |v_j|                   u sqrt(D_V + 2) |dout| |v_j|

Errors of all keys alike add up linearly.  Those of each key by itself add up as a random walk, of
which `SIGMAS` standard deviations are allowed.  The error of a sum sum_j t_j of n terms is thus

    sum_j |t_j| (alike)_j + 5 sqrt(sum_j t_j^2 (by itself)_j^2)
        + (5 u sqrt(n / 3) + 2 w) R + w |sum_j t_j|

where R is the largest partial sum on each rank, added up over ranks: adding is a random walk whose
step is the rounding of what has been summed so far, and a block's result may come in w.

The sum of exponentiated scores only grows, which makes the walk sqrt(n) u / 3 wide, and no kernel
adds it up in one piece: 512 keys or more at a time, in 16 lanes or more, on a CPU; in 4 lanes, of
which each sees a quarter of the keys, on a GPU.  There, tensor cores cut off what they cannot hold,
by up to u / 2 of a growing sum with each 16 terms; only 16-bit inputs get there.

An additive mask rounds scores to the sums' dtype: added to -1e9 in fp32, all scores below 32 become
0, and equal scores have a plain mean that no rounding moves.  So the truth rounds masked scores,
too, and a score so near the middle between two numbers of that dtype that its own error may carry
it across is allowed their difference; no other is.

A missing key lowers lse in all rows, while each row's own errors average out.  So the mean over
rows of the error of lse has a limit, too.

In the backward, p_j = exp(s_j - lse) has the error of lse, too, a common factor of a row, and delta
that of out.  Where lse is so large that it has lost log n, a kernel must not depend on it.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from lvxattn.cli.tensors import Array, dtype_of
from lvxattn.common.validation import accumulator

SIGMAS = 5.0
_UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
}
_COARSE = 2.0**-16


@dataclass(frozen=True)
class Rounding:
    """The rounding errors of a problem.

    Attributes
    ----------
    dtype : str
        Of q, k and v, and of the results.
    D, D_V : int
    n : int
        Number of keys.
    gpu : bool
    """

    dtype: str
    D: int
    D_V: int
    n: int
    gpu: bool

    @property
    def u(self) -> float:
        """Return the unit roundoff of sums."""
        return _UNIT[accumulator(self.dtype)]

    @property
    def w(self) -> float:
        """Return the unit roundoff of results, and of factors of products."""
        return _UNIT[self.dtype]

    @property
    def tiny(self) -> float:
        """Return the magnitude below which a probability is lost."""
        return float(np.finfo(accumulator(self.dtype)).tiny)

    @property
    def floor(self) -> float:
        """Return the error of a probability that is rounded to a subnormal number of fp16."""
        return _SMALLEST["float16"] if self.dtype == "float16" else 0.0

    def scores(self, plain: Array, a: Array, bias: Array | None) -> tuple[Array, Array]:
        """Return masked scores, and the error of those near the middle between two numbers.

        Parameters
        ----------
        plain : (..., keys)
            scale q k^T.
        a : (..., keys)
            |scale| |q| |k|^T.
        bias : optional
            A mask, bool or additive, that broadcasts.
        """
        if bias is None or bias.dtype == bool:
            s = plain if bias is None else np.where(bias, plain, -np.inf)
            return s, np.zeros_like(plain)
        near = SIGMAS * self.alone(a) + 4 * self.u * a
        wide = bias.astype(np.float64)
        s, more, less = (self._held(x + wide) for x in (plain, plain + near, plain - near))
        seen = np.isfinite(s)
        apart = np.maximum(np.where(seen, more - s, 0.0), np.where(seen, s - less, 0.0))
        return s, np.maximum(apart - near, 0.0)

    def probabilities(
        self, p: Array, a: Array, below: Array, across: Array
    ) -> tuple[Array, Array, Array]:
        """Return the absolute errors of probabilities.

        Parameters
        ----------
        p, a : array
        below : array
            |s - top|.
        across : array
            The error of scores near a middle.

        Returns
        -------
        alike, alone : array
            For all keys alike, and the standard deviation of each by itself.
        rounded : array
            The latter, of probabilities as factors of a product.
        """
        u, below = self.u, np.where(p > 0, below, 0.0)
        relative = 4 * u * a + 2 * u * below + 4 * u
        if across.any():
            relative += np.expm1(np.minimum(across, 700.0))
        alone = p * self.alone(a)
        return p * relative + self.tiny, alone, alone + p * self.w + self.floor

    def score_gradients(
        self, p: Array, alike: Array, rounded: Array, x: Array, size: Array, coarse: Array
    ) -> tuple[Array, Array, Array]:
        """Return p x, and its errors of all keys alike and of each by itself.

        Parameters
        ----------
        p, alike, rounded : array
            From `probabilities`.
        x, size : array
            dout v^T - delta, and |dout| |v|^T.
        coarse : array
            Where dout carries the factor that lse has lost, and is rounded again.
        """
        dot = self.u * sqrt(self.D_V + 2) * size
        alike = alike * abs(x) + p * size * (2 * self.u + coarse * self.w)
        alone = (rounded + p * self.w) * abs(x) + p * dot + self.floor
        return p * x, alike, alone

    def alone(self, a: Array) -> Array:
        """Return the standard deviation of each score's own error."""
        return self.u * sqrt(self.D + 2) * a

    @property
    def of_total(self) -> float:
        """Return the relative error of a sum of exponentiated scores by its additions."""
        return SIGMAS * self.adding + 4 * self.u

    @property
    def adding(self) -> float:
        """Return the standard deviation of that error."""
        return self.u * sqrt(self.n / 16 if self.gpu else self.n / 512 + 32) / 3

    def coarse(self, lse: Array) -> Array:
        """Return where lse has lost too much for a backward to depend on it."""
        return (self.u * abs(lse) > _COARSE) & np.isfinite(lse)

    def of_sum(self, value: Array, alike: Array, squares: Array, partial: Array, n: Array) -> Array:
        """Return the limit of a sum's error.

        Parameters
        ----------
        value : array
        alike : array
            The sum of the terms' errors of all keys alike.
        squares : array
            The sum of the squares of each key's own.
        partial : array
            The largest partial sums, added up over ranks.
        n : array
            Numbers of terms.
        """
        steps = SIGMAS * self.u * np.sqrt(n / 3) + 2 * self.w
        if self.gpu and self.w > self.u:
            steps = steps + self.u * n / 32
        limit: Array = alike + SIGMAS * np.sqrt(squares) + steps * partial + self.w * abs(value)
        return limit + self.smallest

    @property
    def smallest(self) -> float:
        """Return the smallest positive number of the results' dtype."""
        return _SMALLEST[self.dtype]

    def _held(self, x: Array) -> Array:
        return x.astype(dtype_of(accumulator(self.dtype))).astype(np.float64)
