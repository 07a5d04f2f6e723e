r"""Judge whether a function's error grows with the number of ranks.

Partial results that are kept or sent in half precision are rounded once more at every merge.  In a
ring, the h-th rounding is of h / P of the result.  In units of the variance of the one rounding
that every function's result has,

    correct, all in the accumulator    1
    correct, P parts come in half      1 + P (1 / P)^2 + 2 / P^2   the last: see below
    wrong, sums travel in half         1 + sum_{1<h<P} (h / P)^2

The errors are the square roots: 1.17 against 1.35 at P = 4, 1.07 against 1.78 at P = 8, 1.01
against 4.7 at P = 64, and always a little less because of earlier roundings.  On P ranks the error
may be `LIMIT` = 1.24 times that on one.  On three and fewer, correct and wrong overlap: 1.25
against 1.20.  Before the first merge a part is rounded, not a sum: h > 1.

That holds where the ranks' parts point the same way, so that a sum is as large as its parts
together; the case is made so, in out, dq, dk and dv.  Roundings of probabilities and of score
gradients average out over its keys.  Parts of equal size add up to a number on a grid of 1 / P
steps of the result's dtype, whose rounding, ties included, has 1 + 2 / P^2 times the usual
variance.  That is for a power of two; for other P parts are finer in comparison: less is added.

A root mean square of N independent errors is known to 1 / sqrt(2 N), the quotient of two to
1 / sqrt(N): 0.8 % for the N = 16,384 of out and dq.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from lvxattn.check.cases import Case
from lvxattn.check.check_report import Row
from lvxattn.check.judge import Verdict
from lvxattn.check.shards import Cut

GROWTH = Case(
    "growth", "growth", "partial results in half precision: the error grows with P", B=4, H=4,
    H_KV=4, S_Q=128, S_KV=512, scale=1 / 16, data="aligned", quick=False, grows=False,
)  # fmt: skip
LIMIT = 1.24
_HALF = ("float16", "bfloat16")
_LEAST = 4


def growth_case(size: int) -> Case:
    """Return the case with lengths that the number of ranks divides."""
    return replace(Cut(size, "divisible").fitted(GROWTH), name=GROWTH.name)


def growth_cuts(dtype: str, size: int) -> list[Cut]:
    """Return the cuts in which the case is run.

    Parameters
    ----------
    dtype : str
    size : int
        Number of ranks.
    """
    if dtype not in _HALF or size < _LEAST:
        return []
    return [Cut(1, "even"), Cut(size, "even")]


def judged_growth(
    rows: Sequence[Row], dtypes: Sequence[str], size: int
) -> tuple[list[Row], list[str]]:
    """Return a row for each half-precision dtype, and notes.

    Parameters
    ----------
    rows : sequence of Row
        Of a check; those of `GROWTH` are used.
    dtypes : sequence of str
        That were checked.
    size : int
        Number of ranks.
    """
    half = [dtype for dtype in dtypes if dtype in _HALF]
    if not half:
        return [], ["growth of the error with P: not judged, needs float16 or bfloat16"]
    if size < _LEAST:
        return [], [f"growth of the error with P: not judged, needs {_LEAST} ranks or more"]
    found, notes = [], []
    for dtype in half:
        ours = [row for row in rows if (row.case, row.dtype) == (GROWTH.name, dtype)]
        errors = {cut: _errors([row for row in ours if row.where == str(cut)])
                  for cut in growth_cuts(dtype, size)}  # fmt: skip
        one, all_ranks = errors.values()
        verdicts = tuple(
            _verdict(name, all_ranks[name] / one[name], size)
            for name in one
            if name in all_ranks and one[name] > 0
        )
        if not verdicts:
            notes.append(f"growth of the error with P, {dtype}: not judged, there are no results")
            continue
        grown = ", ".join(f"{v.name} {v.error:.2f}" for v in verdicts)
        notes.append(f"growth of the error from P=1 to P={size}, {dtype}: {grown}; limit {LIMIT}")
        status = "ok" if all(verdict.passed for verdict in verdicts) else "wrong"
        found.append(Row("growth-with-ranks", GROWTH.group, GROWTH.reason, dtype, 0, status,
                         verdicts=verdicts, where=f"P=1 to P={size}"))  # fmt: skip
    return found, notes


def _errors(rows: Sequence[Row]) -> dict[str, float]:
    """Return the root mean square of the relative errors of each result but lse."""
    squares: dict[str, list[float]] = {}
    for row in rows:
        for verdict in row.verdicts:
            if verdict.name != "lse":
                squares.setdefault(verdict.name, []).append(verdict.error**2)
    return {name: sqrt(sum(found) / len(found)) for name, found in squares.items()}


def _verdict(name: str, growth: float, size: int) -> Verdict:
    """Judge by the added variance, so that an error that does not grow has a ratio near 0."""
    added, allowed = growth**2 - 1, LIMIT**2 - 1
    what = "" if growth <= LIMIT else f"the error grows {growth:.2f} times from P=1 to P={size}"
    return Verdict(
        name, error=growth, limit=LIMIT, ratio=max(0.0, added) / allowed, what=what, index=(),
        got=growth, expected=1.0, max_abs=0.0, ulps=0.0, flash=0.0,
    )  # fmt: skip
