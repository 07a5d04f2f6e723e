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
KINDS = (*CUTS, "divisible")


@dataclass(frozen=True)
class Cut:
    """Where a problem is cut for P ranks.

    Attributes
    ----------
    P : int
    kind : str
        ``"even"``; ``"ragged"``: random lengths, at least one of them 0 for queries and for keys;
        ``"first"``: the first rank holds all keys; ``"last"``: the last rank holds all queries.
        The other axis is cut evenly.  ``"divisible"``: even, of lengths that P divides.
    ranks : tuple of int
        The launcher's ranks that make up the group, in its order; empty for the first P.
    """

    P: int
    kind: str
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Format as in reports."""
        ranks = f", {'ranks' if self.P > 1 else 'rank'} {' '.join(map(str, self.ranks))}"
        return f"P={self.P}, {self.kind}{ranks if self.ranks else ''}"

    @property
    def group(self) -> tuple[int, ...]:
        """The launcher's ranks that make up the group, in its order."""
        return self.ranks or tuple(range(self.P))

    def fitted(self, case: Case) -> Case:
        """Return the case with lengths that can be cut so, and a name of its own if they differ."""
        if self.kind != "divisible":
            return case
        # One-hot keys are distinct up to their own number alone.
        S_KV = case.S_KV + (-case.S_KV % self.P if case.data != "one-hot" else 0)
        fitted = replace(case, S_Q=case.S_Q + -case.S_Q % self.P, S_KV=S_KV - S_KV % self.P)
        return case if fitted == case else replace(fitted, name=f"{case.name}.by-{self.P}")

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
