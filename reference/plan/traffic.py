"""What every rank sends in a pass, message by message, before anything is sent.

The sizes are those that `exchange.py` and `collectives.py` count; a collective is counted as the
fewest bytes that do it.  Everything follows from a `Layout`: shapes, dtype, every rank's lengths,
the order of the ring, the masks that travel.

    lv-xattn    P - 1 hops of queries, P - 1 of results        ~ S_Q / P each
    ring        P - 1 hops of keys and values                  ~ S_KV / P each
    ulysses     1 / P of everything to every rank              ~ (S_Q + S_KV) / P^2 each
    gather      queries to every rank, results to their owner  ~ S_Q / P each
    replicated  rows of the result, joined, to every rank      ~ S_Q / P each
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from lvxattn.reference.layout import Layout, share

ITEMSIZE = {"bool": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Sent:
    """One message.

    Attributes
    ----------
    dest : int
        The rank that it goes to.
    nbytes : int
    """

    dest: int
    nbytes: int


def traffic(layout: Layout, rank: int, *, backward: bool = False) -> list[Sent]:
    """Return the messages that a rank sends in one pass, in no particular order.  Not collective.

    Parameters
    ----------
    layout : Layout
        Its schedule and its queries say what is sent; whose view it is does not matter.
    rank : int
    backward : bool
        Of the backward pass, instead of the forward.

    Returns
    -------
    list of Sent
    """
    which = "replicated" if layout.queries == "replicated" else layout.schedule
    return _BY_SCHEDULE[which](Blocks(layout), rank, backward)


@dataclass(frozen=True)
class Blocks:
    """How many bytes a rank's blocks have.

    Attributes
    ----------
    layout : Layout
    """

    layout: Layout

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(self.layout.size)

    def queries(self, s_q: int, backward: bool) -> int:
        """Return the size of a block of queries: q, or q, dout, lse and delta."""
        of, e, w = self.layout, self._narrow, self._wide
        row = (of.D + of.D_V) * e + 2 * w if backward else of.D * e
        return of.B * of.H * s_q * row

    def result(self, s_q: int, backward: bool) -> int:
        """Return the size of what is computed for a block of queries: out and lse, or dq."""
        of = self.layout
        return of.B * of.H * s_q * (of.D if backward else of.D_V + 1) * self._wide

    def keys(self, owner: int) -> int:
        """Return the size of a rank's keys and values."""
        of = self.layout
        return of.B * of.H_KV * of.s_kv[owner] * (of.D + of.D_V) * self._narrow

    def key_gradients(self, owner: int) -> int:
        """Return the size of dk and dv."""
        of = self.layout
        return of.B * of.H_KV * of.s_kv[owner] * (of.D + of.D_V) * self._wide

    def mask(self, owner: int, heads: int = 1) -> int:
        """Return the size of a rank's array mask, or of what one of `heads` parts of it takes."""
        kind = self.layout.masks[owner]
        if kind is None:
            return 0
        shape = (1,) * (4 - len(kind[0])) + kind[0]
        parts = heads if shape[1] > 1 else 1
        return prod(shape) * ITEMSIZE[kind[1]] // parts

    @property
    def _narrow(self) -> int:
        return ITEMSIZE[self.layout.dtype]

    @property
    def _wide(self) -> int:
        return ITEMSIZE[self.layout.accumulator]


def _round(blocks: Blocks, rank: int, sizes: dict[int, int], skip: int) -> list[Sent]:
    """Return one kind of block's hops: to the right go all blocks but that of `skip`."""
    order = blocks.layout.order
    right = order[(order.index(rank) + 1) % len(order)]
    return [Sent(right, sizes[owner]) for owner in blocks.ranks if owner != skip] * (len(order) > 1)


def _lv_xattn(blocks: Blocks, rank: int, backward: bool) -> list[Sent]:
    order, s_q = blocks.layout.order, blocks.layout.s_q
    right = order[(order.index(rank) + 1) % len(order)]
    queries = {owner: blocks.queries(s_q[owner], backward) for owner in blocks.ranks}
    results = {owner: blocks.result(s_q[owner], backward) for owner in blocks.ranks}
    # A block has been everywhere when it is left of its owner; a result starts one right of it.
    return [*_round(blocks, rank, queries, right), *_round(blocks, rank, results, rank)]


def _ring(blocks: Blocks, rank: int, backward: bool) -> list[Sent]:
    order = blocks.layout.order
    right = order[(order.index(rank) + 1) % len(order)]
    keys = {owner: blocks.keys(owner) + blocks.mask(owner) for owner in blocks.ranks}
    sent = _round(blocks, rank, keys, right)
    if backward:
        gradients = {owner: blocks.key_gradients(owner) for owner in blocks.ranks}
        sent += _round(blocks, rank, gradients, rank)
    return sent


def _ulysses(blocks: Blocks, rank: int, backward: bool) -> list[Sent]:
    layout, P = blocks.layout, blocks.layout.size
    there = [blocks.queries(layout.s_q[rank], backward) // P, blocks.keys(rank) // P]
    if any(layout.masks):
        there.append(blocks.mask(rank, heads=P))
    sent = []
    for dest in _others(blocks, rank):
        back = [blocks.result(layout.s_q[dest], backward) // P]
        back += [blocks.key_gradients(dest) // P] * backward
        sent += [Sent(dest, nbytes) for nbytes in (*there, *back)]
    return sent


def _gather(blocks: Blocks, rank: int, backward: bool) -> list[Sent]:
    s_q = blocks.layout.s_q
    mine = blocks.queries(s_q[rank], backward)
    return [
        Sent(dest, nbytes)
        for dest in _others(blocks, rank)
        for nbytes in (mine, blocks.result(s_q[dest], backward))
    ]


def _replicated(blocks: Blocks, rank: int, backward: bool) -> list[Sent]:
    P, S_Q = blocks.layout.size, blocks.layout.S_Q
    rows = [share(S_Q, owner, P) for owner in blocks.ranks]
    sizes = [blocks.result(part.stop - part.start, backward) for part in rows]
    return [
        Sent(dest, nbytes)
        for dest in _others(blocks, rank)
        for nbytes in (sizes[dest], sizes[rank])
    ]


def _others(blocks: Blocks, rank: int) -> list[int]:
    return [other for other in blocks.ranks if other != rank]


_BY_SCHEDULE: dict[str, Callable[[Blocks, int, bool], list[Sent]]] = {
    "lv-xattn": _lv_xattn,
    "ring": _ring,
    "ulysses": _ulysses,
    "gather": _gather,
    "replicated": _replicated,
}
