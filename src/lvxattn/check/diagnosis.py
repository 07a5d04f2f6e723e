"""Diagnose failures by names from the library of wrong kernels.

    matches *phantom key* to 3e-4
    probably *phantom key*: explains 31 of 31 failures

`matching` defines a match.  A wrong kernel that explains failures must not predict others: each row
on which it would fail, but the function passed, cancels one that it explains.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.cases import Case
from lvxattn.check.check_report import Row
from lvxattn.check.judge import RESULTS, Truth, ratio_of, truth_for
from lvxattn.check.matching import (
    Failure,
    Match,
    compare_results,
    matches,
    message_matches,
    run_kernel,
    same_message,
)
from lvxattn.check.shards import Cut
from lvxattn.check.wrong import KERNELS, WRONG

Array = npt.NDArray[Any]
Key = tuple[str, str, int, str]

_SEARCHES = 12  # of the whole library; afterwards only kernels matched before are tried
_REPLAYED = 200  # rows of a check that are rerun for kernels that keep state
_CANDIDATES = 8  # that are compared with the rows that passed
_ALIKE = 3  # names in one diagnosis


@dataclass
class Suspects:
    """The wrong kernels that explain failures of one check.

    Attributes
    ----------
    cuts : mapping
        By a row's `where`, the cut of its problem, if the function is distributed.
    matches : dict
        By failing row, those about equally near.
    unexplained : dict
        By row, failures that match nothing so far, or messages.
    searches : int
        Number of searches of the whole library.
    """

    cuts: Mapping[str, Cut] = field(default_factory=dict)
    matches: dict[Key, list[Match]] = field(default_factory=dict)
    unexplained: dict[Key, Failure | str] = field(default_factory=dict)
    searches: int = 0

    def examine(
        self,
        row: Row,
        problem: Problem,
        results: dict[str, Array] | None = None,
        truth: Truth | None = None,
    ) -> None:
        """Search for explanations of a failure.

        Parameters
        ----------
        row : Row
        problem : Problem
        results : dict, optional
            The function's, float64 by name, if it returned any.
        truth : Truth, optional
            Of the problem, if there are results.
        """
        failure = (
            row.message
            if truth is None
            else Failure(problem, results or {}, truth, self.cuts.get(row.where))
        )

        def search(names: set[str]) -> list[Match]:
            if isinstance(failure, str):
                return message_matches(names, problem, failure)
            return matches(names, failure)

        known = {match.name for found in self.matches.values() for match in found}
        found = search(known)
        if not found and self.searches < _SEARCHES:
            self.searches += 1
            found = search(KERNELS.keys() - known)
        if found:
            self.matches[_key(row)] = found
        elif len(self.unexplained) < _REPLAYED:
            self.unexplained[_key(row)] = failure

    def conclude(
        self, rows: Sequence[Row], cases: Mapping[str, Case]
    ) -> tuple[tuple[Row, ...], str]:
        """Return the rows with their diagnoses, and an explanation of most failures, if any.

        Parameters
        ----------
        rows : sequence of Row
            All of the check.
        cases : mapping
            Their cases, by name.
        """
        if self.unexplained:
            self._replay(rows, cases)
        failed = [_key(row) for row in rows if row.status in ("wrong", "error")]
        against = self._against(rows, cases)
        left = {key: {match.name: match for match in found} for key, found in self.matches.items()}
        by_dtype = Counter(dtype for _, dtype, _, _ in failed)
        diagnoses: dict[Key, str] = {}
        parts: list[tuple[bool, str]] = []
        while left:
            covers = {name: {key for key in left if name in left[key]} for name in against}
            worth = {
                name: len({key[0] for key in covers[name]}) - against[name] for name in against
            }
            distance = {n: sum(left[key][n].limits for key in covers[n]) for n in against}
            best = max(worth, key=lambda name: (worth[name], -distance[name]))
            rounds = KERNELS[best].compare == "size"
            if worth[best] <= 0:
                break
            alike = [n for n in against if (covers[n], worth[n]) == (covers[best], worth[best])]
            explained = Counter(dtype for _, dtype, _, _ in covers[best])
            most = any(2 * explained[dtype] >= by_dtype[dtype] for dtype in explained)
            if len(alike) <= _ALIKE and (most or not rounds):
                names = [f"*{name}*" for name in dict.fromkeys([best, *alike])]
                count = f"{len(covers[best])} of {sum(by_dtype[x] for x in explained)} failures"
                where = f" in {', '.join(explained)}" if len(explained) < len(by_dtype) else ""
                parts.append((most, f"{' or '.join(names)}: explains {count}{where}"))
                for key in covers[best]:
                    diagnoses[key] = " or ".join([str(left[key][best]), *names[1:]])
            left = {key: found for key, found in left.items() if key not in covers[best]}
        enough = 2 * len(diagnoses) >= len(failed)
        told = "; ".join(text for most, text in parts if most or enough)
        probably = f"probably {told}" if told else ""
        return tuple(replace(row, diagnosis=diagnoses.get(_key(row), "")) for row in rows), probably

    def _replay(self, rows: Sequence[Row], cases: Mapping[str, Case]) -> None:
        """Search the kernels that keep state: rerun the whole check with each."""
        for name in (name for name in WRONG if WRONG[name].keeps_state):
            kernel = WRONG[name]()
            for row in rows[:_REPLAYED]:
                results = run_kernel(kernel, draw(cases[row.case], row.dtype, row.seed), RESULTS)
                failure = self.unexplained.get(_key(row))
                found = []
                if isinstance(failure, Failure) and not isinstance(results, str):
                    deciding = {x: results[x] for x in failure.deciding()}
                    found = compare_results(name, {}, failure, deciding)
                elif isinstance(failure, str) and same_message(results, failure):
                    found = [Match(name, {})]
                if found:
                    self.matches.setdefault(_key(row), []).extend(found)

    def _against(self, rows: Sequence[Row], cases: Mapping[str, Case]) -> dict[str, int]:
        """Return, by best name, the number of passed rows on which that kernel fails."""
        counts: Counter[str] = Counter()
        arguments: dict[str, dict[str, Any]] = {}
        for match in (match for found in self.matches.values() for match in found):
            counts[match.name] += 1
            arguments.setdefault(match.name, match.arguments)
        names = [name for name, _ in counts.most_common(_CANDIDATES)]
        dtypes = [key[1] for key in self.matches]
        passed = sorted((r for r in rows if r.status == "ok"), key=lambda r: r.dtype not in dtypes)
        against = dict.fromkeys(names, 0)
        if not names:
            return against
        for row in {row.case: row for row in reversed(passed)}.values():
            problem = draw(cases[row.case], row.dtype, row.seed)
            truth = truth_for(problem.case, row.dtype, row.seed)
            judged = [verdict.name for verdict in row.verdicts]
            for name in names:
                kernel = KERNELS[name](**arguments[name])
                results = run_kernel(kernel, problem, judged, self.cuts.get(row.where))
                against[name] += isinstance(results, str) or not all(
                    ratio_of(x, results[x], problem, truth) <= 1 for x in judged
                )
        return against


def _key(row: Row) -> Key:
    return row.case, row.dtype, row.seed, row.where
