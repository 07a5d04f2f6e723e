"""Cut a problem among ranks, and join the ranks' results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem
from lvxattn.check.cases import Case

Array = npt.NDArray[Any]

CUTS = ("even", "ragged", "first", "last")


@dataclass(frozen=True)
class Cut:
    """Where a problem is cut for P ranks.

    Attributes
    ----------
    P : int
    kind : str
        ``"even"``; ``"ragged"``: random lengths, at least one of them 0 for queries and for keys;
        ``"first"``: the first rank holds all keys; ``"last"``: the last rank holds all queries.
        The other axis is cut evenly.
    """

    P: int
    kind: str

    def __str__(self) -> str:
        """Format as in reports."""
        return f"P={self.P}, {self.kind}"

    def part(self, problem: Problem, rank: int) -> Problem:
        """Return a rank's part: its queries, its keys, and its keys' columns of the mask."""
        rows, keys = self.slices(problem.case, problem.seed)[rank]
        mask = problem.mask
        return replace(
            problem,
            q=problem.q[:, :, rows],
            k=problem.k[:, :, keys],
            v=problem.v[:, :, keys],
            dout=problem.dout[:, :, rows],
            mask=mask[..., keys] if isinstance(mask, np.ndarray) else mask,
            q_kinds=problem.q_kinds[rows],
            kv_kinds=problem.kv_kinds[keys],
            known={},
        )

    def slices(self, case: Case, seed: int) -> list[tuple[slice, slice]]:
        """Return every rank's queries and keys."""
        rng = np.random.default_rng([seed, self.P, *case.name.encode()])
        q_kind = {"first": "even", "last": "last"}.get(self.kind, self.kind)
        kv_kind = {"first": "first", "last": "even"}.get(self.kind, self.kind)
        q_bounds = _bounds(q_kind, case.S_Q, self.P, rng)
        kv_bounds = _bounds(kv_kind, case.S_KV, self.P, rng)
        return [(slice(*q_bounds[r : r + 2]), slice(*kv_bounds[r : r + 2])) for r in range(self.P)]


def _bounds(kind: str, length: int, P: int, rng: np.random.Generator) -> list[int]:
    if kind == "first":
        return [0] + [length] * P
    if kind == "last":
        return [0] * P + [length]
    if kind == "ragged" and P > 1:
        bounds = [0, *rng.integers(0, length + 1, P - 2).tolist(), length]
        return sorted([*bounds, int(rng.choice(bounds))])  # a bound twice: an empty shard
    return [length * r // P for r in range(P + 1)]


def join_parts(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Concatenate the ranks' results, given in rank order; all have the same names."""
    return {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}


def sweep_of(cases: Sequence[Case], size: int, suite: str, turn: int = 0) -> dict[str, list[Cut]]:
    """Return the cuts in which each case is run, as described in `check_distributed`.

    Parameters
    ----------
    cases : sequence of Case
    size : int
        Number of ranks.
    suite : str
        ``"quick"`` or ``"full"``.
    turn : int
        Starting point of the rotation through kinds and numbers of ranks.
    """
    numbers = [P for P in range(1, size + 1) if P <= 8 or P & (P - 1) == 0 or size == P]
    fewer, several, uneven = numbers[:-1], numbers[1:], CUTS[1:]
    found: dict[str, list[Cut]] = {}
    groups: dict[str, list[str]] = {}
    every = [Cut(P, kind) for P in numbers for kind in CUTS if P > 1 or kind == "even"]
    for n, case in enumerate(cases, turn):
        if case.group == "combinations":  # many: each takes one of all cuts
            found[case.name] = [every[n % len(every)]]
            continue
        groups.setdefault(case.group, []).append(case.name)
        chosen = fewer if suite == "full" else [fewer[n % len(fewer)]] if fewer else []
        found[case.name] = [Cut(size, "even"), *(Cut(P, "even") for P in chosen)]
    n = turn
    for names in groups.values() if several else ():
        kinds_of_each = len(uneven) if suite == "full" else -(-len(uneven) // len(names))
        for name in names:
            for _ in range(kinds_of_each):
                turns, kind = divmod(n, len(uneven))
                P = several[(turns + kind) % len(several)]
                found[name].append(Cut(P, uneven[kind]))
                n += 1
    return found
