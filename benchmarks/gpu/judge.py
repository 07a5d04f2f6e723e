"""The judgement of measured rows: limits, beyond which a result is wrong, and goals.

A wrong result fails its step, whatever its speed.  A missed goal is reported, and fails nothing.
NaN exceeds all limits and misses all goals.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isnan, nan
from typing import Any

Row = dict[str, Any]

WRONG = "FAILED (wrong result)"

# Maximum relative error of rounding to a dtype.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
# Our results and the reference are both rounded twice: the weights of a product, and the product.
ROUNDINGS = 4
# A merge: a dozen roundings of numbers below 64, which bounds lse of standard deviation 10.
MERGE_LIMIT = 12 * 64 * UNIT["float32"]
# Tiles of 128 queries that occupy half of an H100's 132 multiprocessors: a split over keys gains
# much only below this number.
FEW_TILES = 66


@dataclass(frozen=True)
class Goal:
    """A bound on a number of a part's rows.

    Attributes
    ----------
    part, what : str
    bound : float
    least : bool
        Whether `bound` is a minimum; otherwise, a maximum.
    values : callable
        Returns a row's numbers, each with a label; none where they were not measured.
    """

    part: str
    what: str
    bound: float
    least: bool
    values: Callable[[Row], Iterator[tuple[float, str]]]

    def met(self, value: float) -> bool:
        """Return whether a number meets the goal."""
        return value >= self.bound if self.least else value <= self.bound


def verdicts(stored: Row) -> list[Row]:
    """Return for each goal what was required, what was found, and whether it is met.

    Returns
    -------
    list of dict
        ``what``, ``wanted``, ``worst``, ``where``, ``met`` (how many of how many), and ``verdict``:
        ``"met"``, ``"MISSED"``, ``"not measured"``; with ``"so far"`` where the step was cut;
        ``"rehearsed"`` where numbers mean nothing, ``"WRONG RESULT"`` where they must not count.
    """
    outcomes = {step["name"]: step["outcome"] for step in stored["steps"]}
    found = []
    for goal in GOALS:
        rows = stored["parts"].get(goal.part, [])
        values = [value for row in rows for value in goal.values(row)]
        met = sum(goal.met(value) for value, _ in values)
        row: Row = {
            "what": goal.what, "wanted": f"{'at least' if goal.least else 'at most'} {goal.bound}",
            "worst": None, "where": "", "met": f"{met} of {len(values)}",
        }  # fmt: skip
        if values:
            # NaN is worse than any other.
            sign = 1 if goal.least else -1
            row["worst"], row["where"] = min(
                values, key=lambda value: -inf if isnan(value[0]) else sign * value[0]
            )
        verdict = "met" if met == len(values) else "MISSED"
        outcome = outcomes.get(f"benchmark {goal.part}")
        verdict += "" if outcome == "ok" else " so far"
        verdict = "rehearsed" if stored["rehearsal"] else verdict
        verdict = "WRONG RESULT" if outcome == WRONG else verdict
        found.append({**row, "verdict": verdict if values else "not measured"})
    return found


def wrong(part: str, rows: list[Row]) -> list[str]:
    """Return descriptions of a part's wrong results."""
    found = []
    for row in rows:
        if "off by" in row and not row["off by"] <= limit(row):
            found.append(f"{place(row)}: off by {row['off by']:.1e}, at most {limit(row):.1e}")
        if part == "errors":
            # Each rounding is as large as the floor: 2 of it if they are independent, 4 at worst.
            ratios = row["over the floor"]
            found += [
                f"{row['dtype']}, {row['shards']} shards: {name} is off by {ratio:.3g} roundings"
                for name, ratio in ratios.items()
                if not ratio <= ROUNDINGS
            ]
        if part == "merging":
            found += [
                f"s_q {row['s_q']}: {way} is off by {by:.1e}, at most {MERGE_LIMIT:.1e}"
                for way, by in row["differs by"].items()
                if not by <= MERGE_LIMIT
            ]
    return found


def limit(row: Row) -> float:
    """Return the bound on a row's relative distance from another kernel's result, by rounding."""
    return ROUNDINGS * UNIT[row["dtype"]]


def place(row: Row) -> str:
    """Return a label of a row."""
    return f"{row['pass']}, {row['dtype']}, s_q {row['s_q']}, s_kv {row['s_kv']}"


def speedup(row: Row, theirs: dict[str, float]) -> float:
    """Return the time of the fastest of others over ours; NaN if ours did not run."""
    return min(theirs.values()) / row["seconds"].get("auto", nan)


def unsplit(row: Row) -> dict[str, float]:
    """Return the seconds of the backends without a split over keys; only flash has one."""
    return {name: s for name, s in row["sdpa seconds"].items() if name != "sdpa flash"}


def _against_best(row: Row) -> Iterator[tuple[float, str]]:
    if row["sdpa seconds"]:
        yield speedup(row, row["sdpa seconds"]), place(row)


def _against_unsplit(row: Row) -> Iterator[tuple[float, str]]:
    few = row["H"] * -(-row["s_q"] // 128) <= FEW_TILES
    if row["pass"] == "forward" and few and unsplit(row):
        yield speedup(row, unsplit(row)), place(row)


def _ratios(row: Row) -> Iterator[tuple[float, str]]:
    for name in ("forward", "backward", "forward and backward"):
        if name in row:
            yield row[name]["ratio"], name


def _errors(row: Row) -> Iterator[tuple[float, str]]:
    for name, ratio in row["over the floor"].items():
        yield ratio, f"{name}, {row['dtype']}, {row['shards']} shards"


GOALS = (
    Goal("local", "torch_impl: SDPA's best over ours, in time", 0.95, True, _against_best),
    Goal("local", "torch_impl: unsplit SDPA over ours, few queries", 1.5, True, _against_unsplit),
    Goal("cupy", "mpi_impl on CuPy: SDPA's best over ours, in time", 0.8, True, _against_best),
    Goal("overhead", "a rank that is alone, over its block, in time", 1.01, False, _ratios),
    Goal("errors", "errors in half precision, over rounding the truth", 2.0, False, _errors),
    Goal("million", "a million keys: peak of memory over inputs and outputs", 1.3, False, _ratios),
)
