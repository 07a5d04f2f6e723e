"""Is what the attention returned right? Three checks, none of which trusts it.

1. Against the reference in fp64, on the keys of all ranks. A score is at most ``scale``, as keys
   and queries have norm 1; in fp32 it is off by at most ``(D + 4) 2^-24 scale`` (a sum of D rounded
   products, and rounded factors). So is ``lse``; ``out``, an average whose weights are off
   by that share above and below the line, by twice that times the largest entry of the values.

2. Each answer against the truth. With ``w = exp(scale q.k - lse)`` the weight at the true place,
   and no other place farther from it than ``extent``::

       out = w * truth + (1 - w) * (average of other places)
       |out - truth| <= (1 - w) * extent

   An answer is *found* if it rounds to the truth. One that is not found is *ambiguous*, several
   places look alike, if the inequality allows it, and *wrong* if it does not.

3. In the default video, whose frames differ, at least 90 % are found; not asked of one so long that
   the camera comes too close to where it has been.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOUND, AMBIGUOUS, WRONG = "found", "ambiguous", "wrong"


@dataclass(frozen=True)
class Check:
    """One check: what was measured, what is allowed, and why that much."""

    name: str
    measured: float
    allowed: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether it holds; NaN does not."""
        return bool(self.measured <= self.allowed)


def judge_answers(
    out: NDArray[np.floating],
    truth: NDArray[np.int64],
    weight: NDArray[np.float64],
    extent: NDArray[np.integer],
    slack: float,
) -> list[str]:
    """Say of each answer whether it is found, ambiguous or wrong.

    Parameters
    ----------
    out : numpy.ndarray
        (n, 3): the place that the attention returned, as an average of places.
    truth : numpy.ndarray
        (n, 3): the true places.
    weight : numpy.ndarray
        (n,): the attention's weight at the true places.
    extent : numpy.ndarray
        (3,): the largest distance between two places, along each axis.
    slack : float
        How far off rounding may put `weight`, and `out` as a share of `extent`.

    Returns
    -------
    list of str
        ``FOUND``, ``AMBIGUOUS`` or ``WRONG`` for each.
    """
    verdicts = []
    for place, true_place, w in zip(out, truth, weight, strict=True):
        off = np.abs(place - true_place)
        if not (off <= (max(1 - w, 0) + slack) * np.maximum(extent, 1)).all() or w > 1 + slack:
            verdicts.append(WRONG)
        elif (np.rint(place) == true_place).all():
            verdicts.append(FOUND)
        else:
            verdicts.append(AMBIGUOUS)
    return verdicts


def check_errors(
    out: NDArray[np.floating],
    lse: NDArray[np.floating],
    out_true: NDArray[np.float64],
    lse_true: NDArray[np.float64],
    largest: float,
    tolerance: float,
) -> list[Check]:
    """Compare with the reference; `largest` is the largest entry of the values."""
    lse_error = float(np.abs(lse - lse_true).max(initial=0))
    out_error = float(np.abs(out - out_true).max(initial=0)) / max(largest, 1)
    because = "rounded scores: (D+4) 2^-24 scale"
    return [
        Check("lse: largest error", lse_error, tolerance, because),
        Check(
            "out: largest error / largest v", out_error, 2 * tolerance, "weights off by that, twice"
        ),
    ]


def check_verdicts(verdicts: list[str], *, distinct: bool) -> list[Check]:
    """Allow no wrong answer, and few that are ambiguous where all frames are `distinct`."""
    wrong, missed = verdicts.count(WRONG), len(verdicts) - verdicts.count(FOUND)
    limit = "|out - truth| <= (1 - w) extent"
    checks = [Check("answers farther off than weights allow", wrong, 0, limit)]
    if distinct:
        allowed = max(2, len(verdicts) // 10)
        checks.append(Check("queries not found", missed, allowed, "a tenth: all frames differ"))
    return checks


def rounding(D: int, scale: float) -> float:
    """How far off a score of unit vectors may be in fp32."""
    return (D + 4) * 2.0**-24 * scale
