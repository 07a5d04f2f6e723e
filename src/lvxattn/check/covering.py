"""Cases that combine sizes, masks, memory layouts and scales: a covering design.

A defect that depends on several sizes passes cases that vary one at a time.  In these cases every
pair of values of all factors occurs, and every triple of sizes, as far as a problem of both is of
bearable size: values lie on both sides of what kernels switch at.
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
    "heads": ((2, 2), (1, 1), (8, 2), (6, 1), (18, 9)),
    "S_Q": (17, 1, 64, 130),
    "S_KV": (61, 1, 20, 128, 257),
    "D": (8, 17, 64, 96, 128),
    "D_V": ("as D", "less", "more"),
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "mask": (
        "none", "random", "over heads", "over batches", "over queries", "two-dimensional",
        "expanded", "padding", "minus infinity", "dead rows", "callable",
    ),
    "memory": ("contiguous", "transposed", "sequence-major", "broadcast", "read-only"),
    "scale": (None, -0.3, 0.0, 2.0),
}  # fmt: skip
FACTORS = {**SIZES, **OTHERS}

_MOST = 2**20  # scores of one problem
_OTHER_D_V = {"as D": lambda D: D, "less": lambda D: max(1, D // 2 - 1), "more": lambda D: D + 11}

Row = dict[str, Any]
Tuple = tuple[tuple[str, Any], ...]


@cache
def covering() -> tuple[Case, ...]:
    """Return the cases, the same on every machine."""
    return tuple(_case(n, row) for n, row in enumerate(rows(), 1))


def coverage() -> str:
    """Describe what the cases cover."""
    sizes = "; ".join(f"{name} {', '.join(map(str, SIZES[name]))}" for name in SIZES)
    return (
        "every pair of masks, memory layouts, scales and sizes, and every triple of sizes "
        f"({sizes}), up to {_MOST:,} scores"
    )


@cache
def rows() -> tuple[Row, ...]:
    """Return the factors' values of every case."""
    left, found = dict.fromkeys(tuples()), list[Row]()
    while left:
        row = dict(next(iter(left)))
        for name in sorted(FACTORS, key=lambda name: -len(FACTORS[name])):
            if name not in row:
                row[name] = max(
                    (value for value in FACTORS[name] if _bearable({**row, name: value})),
                    key=lambda value: sum(t in left for t in _with(row, name, value)),
                )
        row = {name: row[name] for name in FACTORS}
        for done in _tuples_of(row):
            left.pop(done, None)
        found.append(row)
    return tuple(found)


def tuples() -> Iterator[Tuple]:
    """Return what is to be covered: triples of sizes, and pairs of all factors."""
    for names in (*combinations(SIZES, 3), *combinations(FACTORS, 2)):
        for values in product(*(FACTORS[name] for name in names)):
            wanted = tuple(zip(names, values, strict=True))
            if _bearable(dict(wanted)):
                yield wanted


def _tuples_of(row: Row) -> Iterator[Tuple]:
    for names in (*combinations(SIZES, 3), *combinations(FACTORS, 2)):
        yield tuple((name, row[name]) for name in names)


def _with(row: Row, name: str, value: Any) -> Iterator[Tuple]:
    """Return what a value covers together with those that a row has so far."""
    new, order = {**row, name: value}, list(FACTORS)
    sizes = [x for x in SIZES if x in row and x != name]
    partners = [(x,) for x in row] + (list(combinations(sizes, 2)) if name in SIZES else [])
    for others in partners:
        yield tuple((x, new[x]) for x in sorted((name, *others), key=order.index))


def _bearable(row: Row) -> bool:
    """Whether a problem with these values, and the smallest of the others, is not too large."""
    heads = row.get("heads", (1, 1))[0]
    return bool(heads * prod(row.get(name, 1) for name in ("B", "S_Q", "S_KV")) <= _MOST)


def _case(n: int, row: Row) -> Case:
    (H, H_KV), D = row["heads"], row["D"]
    sizes = {"B": row["B"], "H": H, "H_KV": H_KV, "S_Q": row["S_Q"], "S_KV": row["S_KV"], "D": D}
    sizes["D_V"] = _OTHER_D_V[row["D_V"]](D)
    others = {name: row[name] for name in OTHERS}
    reason = ", ".join(f"{name} {x}" for name, x in {**sizes, **others}.items() if x is not None)
    return Case(
        f"combination-{n}", "combinations", reason, **sizes, **others, quick=False, grows=False
    )
