"""Queries and their answers: which of them are right, and which the picture shows.

Three checks, none of which trusts the attention.

1. Against the reference in fp64, on the keys of all ranks. A score is at most ``scale``, as keys
   and queries have norm 1; in fp32 its error is at most ``(D + 4) 2^-24 scale`` (a sum of D rounded
   products, and rounded factors). So is that of ``lse``; ``out``, an average whose weights have
   this relative error above and below the line, is off by at most twice that times the largest
   entry of the values.

2. Each answer against the truth. With ``w = exp(scale q.k - lse)`` the weight at the true place,
   and no other place farther from it than ``extent``::

       out = w * truth + (1 - w) * (average of other places)
       |out - truth| <= (1 - w) * extent

   An answer is *found* if it rounds to the truth. One that is not found is *ambiguous*, several
   places look alike, if the inequality holds, and *wrong* if it does not.

3. In the default video, whose frames differ, at least 90 % are found; not required of one so long
   that the camera returns too close to where it was.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lvxattn.cli.arguments import cannot_write

FOUND, AMBIGUOUS, WRONG = "found", "ambiguous", "wrong"

ROWS, COLS = 3, 3
"""Examples in the picture, from top to bottom and side by side."""

_FILM = 18  # pictures; a short video shows some of its frames more than once
_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


@dataclass(frozen=True)
class Answers:
    """Queries and their answers, one per row.

    Attributes
    ----------
    asker, holder : (n,), int64
        The rank that asked, and the rank that holds the true place.
    truth : (n, 3), int64
        The true place: frame, row, column.
    seen : (n, PATCH, PATCH, 3), uint8
        The noisy patch.
    q : (n, D), float32
        Its descriptor.
    out : (n, 3), float32
        The place that the attention returned.
    lse : (n,), float32
    weight : (n,), float64
        The attention's weight at the true place.
    """

    asker: NDArray[np.int64]
    holder: NDArray[np.int64]
    truth: NDArray[np.int64]
    seen: NDArray[np.uint8]
    q: NDArray[np.float32]
    out: NDArray[np.float32]
    lse: NDArray[np.float32]
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.asker)

    @staticmethod
    def join(parts: Sequence["Answers"]) -> "Answers":
        """Concatenate the answers of several ranks."""
        names = [field.name for field in fields(Answers)]
        return Answers(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Check:
    """A measured error, its bound, and the reason for the bound."""

    name: str
    measured: float
    allowed: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return bool(self.measured <= self.allowed)


def judge_answers(
    out: NDArray[np.floating],
    truth: NDArray[np.int64],
    weight: NDArray[np.float64],
    extent: NDArray[np.integer],
    slack: float,
) -> list[str]:
    """Return for each answer whether it is found, ambiguous or wrong.

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
        Bound on the rounding error of `weight`, and of `out` relative to `extent`.

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
    name, because = "out: largest error / largest v", "weights off by that, twice"
    return [
        Check("lse: largest error", lse_error, tolerance, "rounded scores: (D+4) 2^-24 scale"),
        Check(name, out_error, 2 * tolerance, because),
    ]


def check_verdicts(verdicts: list[str], *, distinct: bool) -> list[Check]:
    """Allow no wrong answer, and few ambiguous ones if all frames are `distinct`."""
    wrong, missed = verdicts.count(WRONG), len(verdicts) - verdicts.count(FOUND)
    limit = "|out - truth| <= (1 - w) extent"
    checks = [Check("answers farther off than weights allow", wrong, 0, limit)]
    if distinct:
        allowed = max(2, len(verdicts) // 10)
        checks.append(Check("queries not found", missed, allowed, "a tenth: all frames differ"))
    return checks


def rounding(D: int, scale: float) -> float:
    """Return the bound on the error of a score of unit vectors in fp32."""
    return (D + 4) * 2.0**-24 * scale


def check_output(path: Path) -> None:
    """Check that the picture can be drawn and written, without importing matplotlib.

    Raises
    ------
    ValueError
        It cannot.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the picture: expected matplotlib, which draws it; it is not installed "
            "(pip install matplotlib)"
        )
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--output: expected a name in {' '.join(_SUFFIXES)}; got {path}")
    problem = cannot_write(path)
    if problem:
        raise ValueError(f"--output: {problem}")


def choose_examples(answers: Answers, verdicts: Sequence[str]) -> list[int]:
    """Choose answers to show, spread over the video and the askers; the last is one not found.

    Parameters
    ----------
    answers : Answers
        The answers of all ranks.
    verdicts : sequence of str
        One for each answer.

    Returns
    -------
    list of int
        Indices of answers, at most ``ROWS * COLS``.
    """
    found = [n for n, verdict in enumerate(verdicts) if verdict == FOUND]
    other = [n for n, verdict in enumerate(verdicts) if verdict != FOUND]
    found.sort(key=lambda n: int(answers.truth[n, 0]))
    parts = min(len(found), ROWS * COLS - bool(other))
    texture = answers.seen.mean(axis=-1).std(axis=(1, 2))
    chosen: list[int] = []
    for part in range(parts):  # of each part of the video, the asker shown least, then most texture
        share = np.array(found[part * len(found) // parts : (part + 1) * len(found) // parts])
        shown = [int((answers.asker[chosen] == answers.asker[n]).sum()) for n in share]
        chosen.append(int(share[np.lexsort((-texture[share], shown))[0]]))
    return chosen + other[: ROWS * COLS - parts if not chosen else 1]


def frames_to_draw(answers: Answers, examples: Sequence[int], frames: int) -> list[int]:
    """Return the numbers of the frames that the picture shows, ascending."""
    return sorted({*film_frames(frames), *(int(answers.truth[n, 0]) for n in examples)})


def film_frames(frames: int) -> list[int]:
    """Return the number of the middle frame of each part of the film."""
    return [(2 * n + 1) * frames // (2 * _FILM) for n in range(_FILM)]
