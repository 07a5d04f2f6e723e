"""Cases that combine sizes, masks, memory layouts and scales: a covering design.

A defect that depends on several sizes passes cases that vary one at a time.  In these cases every
pair of values of all factors occurs, and every triple of sizes, as far as a problem of both is of
bearable size: values lie on both sides of what kernels switch at.  The quick suite has the
pairs of some.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from math import prod
from typing import Any

from lvxattn.check.cases import Case

# Sizes; (H, H_KV); D_V relative to D.
SIZES: dict[str, tuple[Any, ...]] = {
    "B": (1, 2, 3, 5),
    "heads": ((2, 2), (1, 1), (8, 2), (6, 1), (6, 2), (18, 9)),
    "S_Q": (17, 1, 64, 129),
    "S_KV": (61, 1, 20, 256, 257),
    "D": (8, 17, 64, 96, 128),
    "D_V": ("as D", "less", "more"),
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "mask": (
        "none", "random", "over heads", "over batches", "over queries", "two-dimensional",
        "expanded", "padding", "minus infinity", "dead rows", "sparse", "callable",
    ),
    "memory": (
        "contiguous", "transposed", "sequence-major", "broadcast", "read-only", "cache", "mixed",
    ),
    "scale": (None, -0.3, 0.0, 2.0),
}  # fmt: skip
FACTORS = {**SIZES, **OTHERS}
QUICK: dict[str, tuple[Any, ...]] = {
    "B": (1, 3),
    "heads": ((2, 2), (6, 2), (18, 9)),
    "S_Q": (17, 1, 129),
    "S_KV": (61, 20, 256),
    "D": (8, 96),
    "D_V": ("as D", "less", "more"),
    "mask": (
        "none", "random", "over batches", "padding", "minus infinity", "sparse", "callable",
    ),
    "memory": ("contiguous", "sequence-major", "cache", "mixed"),
    "scale": (None, -0.3, 0.0),
}  # fmt: skip

_MOST, _MOST_QUICK = 2**20, 2**17  # scores of one problem
_OTHER_D_V = {"as D": lambda D: D, "less": lambda D: max(1, D // 2 - 1), "more": lambda D: D + 11}

Row = dict[str, Any]
Tuple = tuple[tuple[str, Any], ...]


@cache
def covering() -> tuple[Case, ...]:
    """Return the cases of the full suite, the same on every machine."""
    return tuple(_case(f"combination-{n}", row) for n, row in enumerate(rows(), 1))


@cache
def pairs() -> tuple[Case, ...]:
    """Return the cases of the quick suite, the same on every machine."""
    return tuple(_case(f"pairs-{n}", row, quick=True) for n, row in enumerate(quick_rows(), 1))


def coverage() -> str:
    """Describe what the cases cover."""
    sizes = "; ".join(f"{name} {', '.join(map(str, SIZES[name]))}" for name in SIZES)
    return (
        "every pair of masks, memory layouts, scales and sizes, and every triple of sizes "
        f"({sizes}), up to {_MOST:,} scores; in the quick suite pairs of some of them"
    )


@cache
def rows() -> tuple[Row, ...]:
    """Return the factors' values of every case of the full suite."""
    return tuple(_rows(FACTORS, tuple(combinations(SIZES, 3)), _MOST))


@cache
def quick_rows() -> tuple[Row, ...]:
    """Return the factors' values of every case of the quick suite."""
    return tuple(_rows(QUICK, (), _MOST_QUICK))


def _rows(
    factors: dict[str, tuple[Any, ...]], triples: tuple[tuple[str, ...], ...], most: int
) -> Iterator[Row]:
    """Yield rows until every pair of values, and triple of these factors, has occurred."""
    groups = (*triples, *combinations(factors, 2))
    left = {
        wanted: None
        for names in groups
        for values in product(*(factors[name] for name in names))
        if _bearable(dict(wanted := tuple(zip(names, values, strict=True))), most)
    }
    while left:
        row = dict(next(iter(left)))
        for name in sorted(factors, key=lambda name: -len(factors[name])):
            if name not in row:
                row[name] = max(
                    (x for x in factors[name] if _bearable({**row, name: x}, most)),
                    key=lambda x: sum(
                        done in left for done in _tuples_of({**row, name: x}, groups, name)
                    ),
                )
        row = {name: row[name] for name in factors}
        for done in _tuples_of(row, groups):
            left.pop(done, None)
        yield row


def _tuples_of(row: Row, groups: tuple[tuple[str, ...], ...], which: str = "") -> Iterator[Tuple]:
    """Return what the values of a row cover together, only with one of them if that is named."""
    for names in groups:
        if (not which or which in names) and all(name in row for name in names):
            yield tuple((name, row[name]) for name in names)


def _bearable(row: Row, most: int) -> bool:
    """Whether a problem with these values, and the smallest of the others, is not too large."""
    heads = row.get("heads", (1, 1))[0]
    return bool(heads * prod(row.get(name, 1) for name in ("B", "S_Q", "S_KV")) <= most)


def _case(name: str, row: Row, *, quick: bool = False) -> Case:
    (H, H_KV), D = row["heads"], row["D"]
    sizes = {"B": row["B"], "H": H, "H_KV": H_KV, "S_Q": row["S_Q"], "S_KV": row["S_KV"], "D": D}
    sizes["D_V"] = _OTHER_D_V[row["D_V"]](D)
    others = {x: row[x] for x in OTHERS}
    reason = ", ".join(f"{what} {x}" for what, x in {**sizes, **others}.items() if x is not None)
    return Case(name, "combinations", reason, **sizes, **others, quick=quick, grows=False)
