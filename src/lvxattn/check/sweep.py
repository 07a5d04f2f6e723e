"""Which cuts each case of a distributed function gets: numbers of ranks, cuts, groups.

A defect may show only in some combination of these, such as uneven cuts of a group that does not
begin with rank 0.  So their pairs are covered, as `covering` does for sizes.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from lvxattn.check.cases import Case
from lvxattn.check.shards import CUTS, Cut

# Ranks of 4 for P = 2: 0 1; 2 3; 1 3; 3 1.  For P = 3: 0 1 2; 1 2 3; 0 2 3; 3 2 0.
ASCENDING = ("first", "last", "strided")
GROUPS = (*ASCENDING, "reversed")

_STEP = 11  # of the starting point in all cuts, from one turn to the next

_ALL = ("all", "")
_MANY = 20  # cases: fewer do not get more cuts only to cover all pairs

Features = tuple[tuple[str, Any], ...]


def coverage() -> str:
    """Describe what the cuts cover."""
    return (
        "--distributed: every pair of a number of ranks (1 to 8, then powers of two, and all), a "
        f"cut ({', '.join(CUTS)}) and a group ({', '.join(GROUPS)} ranks of the launcher); every "
        "group of cases with every cut and every group of ranks, masks with their pairs; in the "
        "full suite also every case with each of these, every group of cases with their pairs, and "
        "every size, mask, memory layout and scale of the combinations with each"
    )


def sweep_of(
    cases: Sequence[Case],
    size: int,
    suite: str,
    turn: int = 0,
    cuts: Sequence[str] = CUTS,
    groups: Sequence[str] = GROUPS,
) -> dict[str, list[Cut]]:
    """Return the cuts in which each case is run, as described in `check_distributed`.

    Parameters
    ----------
    cases : sequence of Case
    size : int
        Number of ranks.
    suite : str
        ``"quick"`` or ``"full"``.
    turn : int
        Starting point of the rotation through equally good cuts.
    cuts, groups : sequence of str
        The kinds to choose from.
    """
    every = list(ways(size, cuts, groups).items())
    start = turn * _STEP % len(every)
    every = [*every[start:], *every[:start]]
    items = list(dict.fromkeys(item for _, features in every for item in _items(features)))
    traits = {case: _traits(case) for case in cases}
    # What is to be covered, with a case that can.
    left: dict[tuple[Any, Any], Case] = {
        (trait, item): case
        for case in cases
        for trait in traits[case]
        for item in items
        if _matters(trait, item, suite == "full")
    }
    found: dict[str, list[Cut]] = {case.name: [] for case in cases}
    used: Counter[Cut] = Counter()

    def take(case: Case, among: Sequence[tuple[Cut, Features]]) -> None:
        if not among:
            return
        need = Counter(item for trait in traits[case] for item in items if (trait, item) in left)
        new = [way for way in among if way[0] not in found[case.name]]

        def gain(way: tuple[Cut, Features]) -> tuple[int, int]:
            return sum(need[item] for item in _items(way[1])), -used[way[0]]

        cut, features = max(new or among, key=gain)
        used[cut] += 1
        found[case.name] += [cut] if new else []
        for trait in traits[case]:
            for item in _items(features):
                left.pop((trait, item), None)

    usual = _usual(cuts)
    for case in cases:
        if case.group == "combinations":  # many: each takes one of all cuts
            take(case, every)
            continue
        take(case, [way for way in every if way[0] == Cut(size, usual)])
        take(case, [way for way in every if size != way[0].P])
        take(case, [way for way in every if way[0].kind != usual or way[0].P == size > 1])
    many = len(cases) >= _MANY
    for trait, item in list(left):
        if (trait, item) in left and (trait != _ALL or (len(item) == 2 and many)):
            take(left[trait, item], [way for way in every if item in _items(way[1])])
    return found


def ways(
    size: int, cuts: Sequence[str] = CUTS, groups: Sequence[str] = GROUPS
) -> dict[Cut, Features]:
    """Return all ways to cut a problem, and of each number of ranks, kind of cut, and of group."""
    found: dict[Cut, Features] = {}
    for P in (P for P in range(1, size + 1) if P <= 8 or P & (P - 1) == 0 or size == P):
        for group in groups:
            ranks = _ranks(group, P, size)
            for kind in cuts if P > 1 else [_usual(cuts)]:
                cut = Cut(P, kind, () if ranks == tuple(range(P)) else ranks)
                found.setdefault(cut, (("P", P), ("cut", kind), ("group", group)))
    return found


def described(cut: Cut, size: int) -> dict[str, Any]:
    """Return what failures may depend on."""
    group = next(group for group in GROUPS if _ranks(group, cut.P, size) == cut.group)
    which = "0 to P-1" if group == "first" else "not 0 to P-1"
    return {"P": cut.P, "cut": cut.kind, "group": group, "group of ranks": which}


def _usual(cuts: Sequence[str]) -> str:
    """Return the kind of cut that one rank gets, and every case on all ranks."""
    return next((kind for kind in ("even", "divisible") if kind in cuts), cuts[0])


def _ranks(group: str, P: int, size: int) -> tuple[int, ...]:
    """Return the launcher's ranks in a group, in its order."""
    if group == "first":
        return tuple(range(P))
    if group == "last":
        return tuple(range(size - P, size))
    step = size // P
    found = range(size - 1 - (P - 1) * step, size, step)
    strided = tuple(found) if step > 1 else (0, *range(size - P + 1, size))
    return strided if group == "strided" else strided[::-1]


def _items(features: Features) -> tuple[Any, ...]:
    """Return the features of a cut, their pairs, and all together."""
    return *features, *combinations(features, 2), features


def _traits(case: Case) -> tuple[Any, ...]:
    """Return what of a case is to be covered with items."""
    if case.group != "combinations":
        return _ALL, ("cases", case.group), ("case", case.name)
    names = ("B", "S_Q", "S_KV", "D", "mask", "memory", "scale")
    sizes = {name: getattr(case, name) for name in names}
    related = {"heads": (case.H, case.H_KV), "D_V": np.sign(case.D_V - case.D)}
    return _ALL, *(sizes | related).items()


def _matters(trait: Any, item: Any, full: bool) -> bool:
    """Whether a trait is to be covered with an item."""
    count = len(item) if isinstance(item[0], tuple) else 1
    if trait == _ALL:
        return count > 1
    if trait[0] == "cases" and not full:
        # Without a mask, results do not depend on the order of keys: nor on that of ranks.
        most = 2 if trait[1].startswith("mask") else 1
        return count <= most and all(name != "P" for name, _ in (item if count > 1 else [item]))
    if trait[0] == "cases":
        return count < 3
    return full and count == 1
