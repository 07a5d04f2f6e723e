"""The rings round which blocks move, and where they stop."""

from collections import Counter
from typing import TYPE_CHECKING

from lvxattn.common.rules import visible_parts

if TYPE_CHECKING:
    from lvxattn.common.layout import Layout  # which imports this


def side_inside(layout: "Layout") -> tuple[str, int]:
    """Return the side whose rings are of neighbours in the order, and the size of these rings.

    Of a grid's two sides, the one with which fewer bytes cross from host to host, forward and
    backward.  With m ranks a host, a ring of n neighbours stays inside, or is crossed once by n or
    m ranks; of the other rings, whose ranks are n apart, at most n of m ranks send to another host.
    """
    (a, b), D, D_V = layout.shape, layout.D, layout.D_V
    wide = 1 if layout.dtype == layout.accumulator else 2  # times as many bytes
    row = layout.H * (2 * D + D_V + wide * (D + D_V + 4))
    key = layout.H_KV * (2 + wide) * (D + D_V)
    queries, keys = (a - 1) * layout.S_Q * row, (b - 1) * layout.S_KV * key
    m = max(Counter(layout.hosts).values(), default=layout.size)

    def crossing(near: float, far: float, n: int) -> float:
        return near * (0 if m % n == 0 else 1 / min(n, m)) + far * min(1, n / m)

    if crossing(queries, keys, a) <= crossing(keys, queries, b):
        return "queries", a
    return "keys", b


def rings(layout: "Layout") -> dict[tuple[str, int], tuple[int, ...]]:
    """Return every rank's column, round which its queries move, and its row, of its keys.

    The ranks lie in a grid, in their order; those of a ring of `side_inside` are neighbours.
    """
    inside, n = layout.inside
    outside = "keys" if inside == "queries" else "queries"
    found = {}
    for place, rank in enumerate(layout.order):
        start = place - place % n
        found[inside, rank] = layout.order[start : start + n]
        found[outside, rank] = layout.order[place % n :: n]
    return found


def stops(layout: "Layout", side: str, owner: int) -> dict[int, slice]:
    """Return the hops after which an owner's block stops, and the rows needed there."""
    ring = layout.ring(side, owner)
    length = (layout.s_q if side == "queries" else layout.s_kv)[owner]
    everywhere = range(1, len(ring))
    if not layout.structures or layout.keys == "replicated":
        return dict.fromkeys(everywhere, slice(0, length))
    place, found = ring.index(owner), {}
    for hop in everywhere:
        rows = _needed(layout, side, owner, ring[(place + hop) % len(ring)])
        if rows is not None:
            found[hop] = rows
    return found


def _needed(layout: "Layout", side: str, owner: int, rank: int) -> slice | None:
    """Return the rows of an owner's block that meet something visible on a rank."""
    queries = side == "queries"
    length, parts = (layout.s_q if queries else layout.s_kv)[owner], []
    for other in layout.ring("keys" if queries else "queries", rank):
        q_owner, kv_owner = (owner, other) if queries else (other, owner)
        rule = layout.structures[kv_owner]
        if rule is None:
            return slice(0, length)
        rows, keys = (
            slice(sum(lengths[:of]), sum(lengths[: of + 1]))
            for lengths, of in ((layout.s_q, q_owner), (layout.s_kv, kv_owner))
        )
        start = (rows if queries else keys).start
        for its_rows, its_keys, _ in visible_parts(rule, rows, keys, every_edge=True):
            part = its_rows if queries else its_keys
            parts.append(slice(part.start - start, part.stop - start))
    if not parts:
        return None
    return slice(min(x.start for x in parts), max(x.stop for x in parts))
