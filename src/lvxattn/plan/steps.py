r"""The steps of every rank in a pass: the schedules without their arrays.

The steps are those of `lv_xattn.py`, `ring_attention.py`, `grid.py`, `ulysses.py`, `gather.py` and
`replicated.py`, in their order.  Messages are thus known to the byte before anything is sent, and
a pass can be simulated on any machine (`simulate.py`).  A collective is one message to and from
each other rank, the fewest bytes that suffice.  The stamp that torch_impl adds to messages of a
backward through host memory counts too: `Layout.stamp_nbytes` each.  Not included, since shapes do
not determine it, is the forward with which a backward of `reference` and `mpi_impl` begins where an
lse is large.

Everything follows from a `Layout`: shapes, dtype, every rank's lengths, the order of the ring, the
masks that travel.

    lv-xattn    P - 1 hops of queries, P - 1 of results        ~ S_Q / P each
    ring        P - 1 hops of keys and values                  ~ S_KV / P each
    grid        a - 1 hops of queries and results, b - 1 of keys   as above
    ulysses     1 / P of everything to every rank              ~ (S_Q + S_KV) / P^2 each
    gather      queries to every rank, results to their owner  ~ S_Q / P each
    replicated  rows of the result, joined, to every rank      ~ S_Q / P each
    (of keys)   backward only: dk and dv, joined likewise      ~ S_KV / P each
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from lvxattn.common.exchange_base import RotationBase
from lvxattn.common.layout import Layout, share
from lvxattn.common.wire import (
    KEY_GRADIENTS,
    KEYS_VALUES,
    PARTIALS,
    QUERIES,
    QUERY_BLOCKS,
    QUERY_GRADIENTS,
)

BLOCKS, RESULTS = "blocks", "results"
# Of the five matrix products of a backward, those that the wanted gradients need.
SHARES = {"qkv": 1.0, "q": 3 / 5, "kv": 4 / 5}


@dataclass(frozen=True)
class Compute:
    """Attend from a block of queries to some keys.

    Attributes
    ----------
    s_q, s_kv : int
    heads : float
        The share of the heads; less where not all gradients are wanted.
    """

    s_q: int
    s_kv: int
    heads: float = 1.0


@dataclass(frozen=True)
class Fill:
    """Write memory: set sums to zero, or join one's own rows to those of others.

    Attributes
    ----------
    nbytes : int
    """

    nbytes: int


@dataclass(frozen=True)
class Send:
    """Send a message.

    Attributes
    ----------
    dest : int
    nbytes : int
    kind : str
        Messages of one kind from one rank to another arrive in order.
    packed : bool
        Whether it is copied into a buffer first; a block that is passed on is in one already.
    at_once : bool
        Whether it is one of a collective.
    """

    dest: int
    nbytes: int
    kind: str
    packed: bool = True
    at_once: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Wait:
    """Wait for the next message of a kind from a rank.

    Attributes
    ----------
    source : int
    kind : str
    unpacked : int
        Bytes that are then copied out of its buffer.
    at_once : bool
        Whether it is one of a collective.
    """

    source: int
    kind: str
    unpacked: int = 0
    at_once: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Join:
    """Merge, or add, partial results.

    Attributes
    ----------
    nbytes : int
        Of the results that arrived.
    """

    nbytes: int


Step = Compute | Fill | Send | Wait | Join


def steps(layout: Layout, rank: int, *, backward: bool = False) -> list[Step]:
    """Return the steps of one rank in one pass.  Not collective.

    Parameters
    ----------
    layout : Layout
        As any rank sees it.
    rank : int
    backward : bool
        The backward pass, instead of the forward.

    Returns
    -------
    list of Compute, Fill, Send, Wait and Join

    Examples
    --------
    >>> from lvxattn.plan import planned
    >>> for step in steps(planned((1, 1, 8, 64), (1, 1, 100, 64), P=2, schedule="ring"), rank=0):
    ...     print(step)
    Send(dest=1, nbytes=12800, kind='blocks', packed=True)
    Compute(s_q=4, s_kv=25, heads=1.0)
    Compute(s_q=4, s_kv=25, heads=1.0)
    Join(nbytes=1056)
    Wait(source=1, kind='blocks', unpacked=0)
    Compute(s_q=4, s_kv=50, heads=1.0)
    Join(nbytes=1056)
    """
    blocks = Blocks(layout.seen_by(rank), backward)
    found = list(_BY_SCHEDULE[layout.way](blocks))
    if not backward:
        return found
    share = SHARES[layout.gradients]
    return [
        replace(step, nbytes=step.nbytes + layout.stamp_nbytes) if isinstance(step, Send)
        else replace(step, heads=step.heads * share) if isinstance(step, Compute)
        else step
        for step in found
    ]  # fmt: skip


def messages(layout: Layout, rank: int, *, backward: bool = False) -> list[Send]:
    """Return the messages that a rank sends in one pass.  Not collective.

    Parameters
    ----------
    layout, rank, backward
        As given to `steps`.

    Returns
    -------
    list of Send

    Examples
    --------
    >>> from lvxattn.plan import planned
    >>> sent = messages(planned((1, 8, 64, 64), (1, 8, 65536, 64), P=4), rank=0)
    >>> len(sent), sum(message.nbytes for message in sent)
    (6, 150528)
    """
    return [s for s in steps(layout, rank, backward=backward) if isinstance(s, Send)]


@dataclass(frozen=True)
class Blocks:
    """Bytes of every rank's blocks in a pass, as one rank sees them.

    Attributes
    ----------
    layout : Layout
    backward : bool
    """

    layout: Layout
    backward: bool

    def queries(self, owner: int) -> int:
        """Return the size of a block of queries."""
        return (QUERY_BLOCKS if self.backward else QUERIES).nbytes(self.layout, owner)

    def result(self, owner: int) -> int:
        """Return the size of what is computed for a block of queries."""
        return (QUERY_GRADIENTS if self.backward else PARTIALS).nbytes(self.layout, owner)

    def keys(self, owner: int) -> int:
        """Return the size of a rank's keys and values, with their array mask."""
        return KEYS_VALUES.nbytes(self.layout, owner)

    def mask(self, owner: int) -> int:
        """Return the size of a rank's array mask."""
        return sum(field.nbytes for field in KEYS_VALUES.fields(self.layout, owner)[2:])

    def key_gradients(self, owner: int) -> int:
        """Return the size of dk and dv."""
        return KEY_GRADIENTS.nbytes(self.layout, owner)

    def wanted(self, x: str) -> bool:
        """Return whether a gradient is computed in this pass."""
        return self.backward and x in self.layout.gradients

    def others(self) -> list[int]:
        """Return the other ranks; each rank starts with another, its right neighbour."""
        layout = self.layout
        return [layout.owner(-place) for place in range(1, layout.size)]


def _lv_xattn(blocks: Blocks) -> Iterator[Step]:
    layout, P, rank = blocks.layout, blocks.layout.size, blocks.layout.rank
    there, back = (QUERY_BLOCKS, QUERY_GRADIENTS) if blocks.backward else (QUERIES, PARTIALS)
    queries, partials = RotationBase(layout, there), RotationBase(layout, back)
    s_q, s_kv, cut = layout.s_q, layout.s_kv[rank], layout.home_cut
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield from _leave(queries, 0, BLOCKS)
    yield Compute(s_q[rank], cut)
    for hop, leg in queries.comes.items():
        yield Wait(queries.source(leg), BLOCKS)
        yield from _leave(queries, hop, BLOCKS, packed=False)
        yield Compute(s_q[leg.owner], s_kv)
        part = blocks.result(leg.owner)
        if hop in partials.comes:
            yield Wait(partials.source(partials.comes[hop]), RESULTS)
            yield Join(part)
        yield from _leave(partials, hop, RESULTS)
    if P > 1:
        yield Compute(s_q[rank], s_kv - cut)
    if P in partials.comes:
        yield Wait(partials.source(partials.comes[P]), RESULTS)
        yield Join(blocks.result(rank))


def _ring(blocks: Blocks) -> Iterator[Step]:
    layout, P, rank = blocks.layout, blocks.layout.size, blocks.layout.rank
    keys, gradients = RotationBase(layout, KEYS_VALUES), RotationBase(layout, KEY_GRADIENTS)
    s_q, s_kv, cut = layout.s_q[rank], layout.s_kv, layout.home_cut
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield from _leave(keys, 0, BLOCKS)
    yield Compute(s_q, cut)
    if P > 1 and not blocks.backward:
        yield Compute(s_q, s_kv[rank] - cut)
        yield Join(blocks.result(rank))
    for hop, leg in keys.comes.items():
        yield Wait(keys.source(leg), BLOCKS)
        yield from _leave(keys, hop, BLOCKS, packed=False)
        if blocks.backward:
            yield Fill(blocks.key_gradients(leg.owner))
        yield Compute(s_q, s_kv[leg.owner])
        if not blocks.backward:
            yield Join(blocks.result(rank))
            continue
        part = blocks.key_gradients(leg.owner)
        if hop in gradients.comes:
            yield Wait(gradients.source(gradients.comes[hop]), RESULTS)
            yield Join(part)
        yield from _leave(gradients, hop, RESULTS)
    if blocks.backward and P > 1:
        yield Compute(s_q, s_kv[rank] - cut)
        if P in gradients.comes:
            yield Wait(gradients.source(gradients.comes[P]), RESULTS)
            yield Join(blocks.key_gradients(rank))


def _grid(blocks: Blocks) -> Iterator[Step]:
    layout, P, rank = blocks.layout, blocks.layout.size, blocks.layout.rank
    there, back = (QUERY_BLOCKS, QUERY_GRADIENTS) if blocks.backward else (QUERIES, PARTIALS)
    queries, keys = RotationBase(layout, there), RotationBase(layout, KEYS_VALUES)
    results, gradients = RotationBase(layout, back), RotationBase(layout, KEY_GRADIENTS)
    s_q, s_kv, cut = layout.s_q, layout.s_kv, layout.home_cut
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield from _leave(queries, 0, BLOCKS)
    yield from _leave(keys, 0, "keys")
    yield Compute(s_q[rank], cut)
    for key_hop in range(keys.size):
        owner = keys.owner(key_hop)
        if key_hop in keys.comes:
            yield Wait(keys.source(keys.comes[key_hop]), "keys")
            yield from _leave(keys, key_hop, "keys", packed=False)
            if blocks.backward:
                yield Fill(blocks.key_gradients(owner))
            yield Compute(s_q[rank], s_kv[owner])
            if not blocks.backward:
                yield Join(blocks.result(rank))
        for hop, leg in queries.comes.items():
            if key_hop == 0:
                yield Wait(queries.source(leg), BLOCKS)
                yield from _leave(queries, hop, BLOCKS, packed=False)
                yield Fill(blocks.queries(leg.owner))
            if key_hop == 0 or key_hop in keys.comes:
                yield Compute(s_q[leg.owner], s_kv[owner])
                if key_hop > 0:
                    yield Join(blocks.result(leg.owner))
            if key_hop == keys.size - 1:
                if hop in results.comes:
                    yield Wait(results.source(results.comes[hop]), RESULTS)
                    yield Join(blocks.result(leg.owner))
                yield from _leave(results, hop, RESULTS)
        if blocks.backward and key_hop in keys.comes:
            if key_hop in gradients.comes:
                yield Wait(gradients.source(gradients.comes[key_hop]), "key gradients")
                yield Join(blocks.key_gradients(owner))
            yield from _leave(gradients, key_hop, "key gradients")
    if P > 1:
        yield Compute(s_q[rank], s_kv[rank] - cut)
    if results.size in results.comes:
        yield Wait(results.source(results.comes[results.size]), RESULTS)
        yield Join(blocks.result(rank))
    if blocks.backward and gradients.size in gradients.comes:
        yield Wait(gradients.source(gradients.comes[gradients.size]), "key gradients")
        yield Join(blocks.key_gradients(rank))


def _leave(rotation: RotationBase, hop: int, kind: str, *, packed: bool = True) -> Iterator[Step]:
    """Yield the message with the block that is here at a hop, if it has another stop."""
    if (leg := rotation.leaves.get(hop)) is not None:
        packed = packed or leg.rows != rotation.comes[hop].rows
        yield Send(rotation.dest(leg), rotation.nbytes(leg), kind, packed)


def _ulysses(blocks: Blocks) -> Iterator[Step]:
    layout, P, rank = blocks.layout, blocks.layout.size, blocks.layout.rank
    others, ranks = blocks.others(), range(P)
    there = [
        [blocks.queries(owner) // P for owner in ranks],
        [(blocks.keys(owner) - blocks.mask(owner)) // P for owner in ranks],
    ]
    if any(layout.masks):
        # A mask with a head axis is cut, too.
        cut = [P if mask and (1, 1, *mask[0])[-3] > 1 else 1 for mask in layout.masks]
        there.append([blocks.mask(owner) // cut[owner] for owner in ranks])
    for sizes in there:
        yield from _all_gather(others, sizes, rank)
    if blocks.backward:
        yield Fill(sum(map(blocks.key_gradients, ranks)) // P)
    yield Compute(layout.S_Q, layout.S_KV, 1 / P)
    back = [blocks.result] if blocks.wanted("q") or not blocks.backward else []
    for size in [*back, blocks.key_gradients] if blocks.wanted("k") else back:
        yield from _scatter(others, [size(owner) // P for owner in ranks], size(rank) // P)


def _gather(blocks: Blocks) -> Iterator[Step]:
    layout, others, rank = blocks.layout, blocks.others(), blocks.layout.rank
    queries, results = (
        [size(owner) for owner in range(layout.size)] for size in (blocks.queries, blocks.result)
    )
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield from _all_gather(others, queries, rank)
    yield Compute(layout.S_Q, layout.s_kv[rank])
    if blocks.wanted("q") or not blocks.backward:
        yield from _scatter(others, results)
        yield from [Join(results[rank])] * len(others)


def _replicated_queries(blocks: Blocks) -> Iterator[Step]:
    layout, rank = blocks.layout, blocks.layout.rank
    joined = Blocks(replace(layout, s_q=_rows(layout.S_Q, layout.size)), blocks.backward)
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield Compute(layout.S_Q, layout.s_kv[rank])
    if blocks.wanted("q") or not blocks.backward:
        yield from _all_reduce(blocks, joined.result)


def _replicated_keys(blocks: Blocks) -> Iterator[Step]:
    layout, rank = blocks.layout, blocks.layout.rank
    joined = Blocks(replace(layout, s_kv=_rows(layout.S_KV, layout.size)), blocks.backward)
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield Compute(layout.s_q[rank], layout.S_KV)
    if blocks.wanted("k"):
        yield from _all_reduce(blocks, joined.key_gradients)


def _rows(length: int, size: int) -> tuple[int, ...]:
    """Return the number of rows of each rank's part."""
    parts = [share(length, owner, size) for owner in range(size)]
    return tuple(part.stop - part.start for part in parts)


def _all_reduce(blocks: Blocks, size: Callable[[int], int]) -> Iterator[Step]:
    """Yield the messages that join all ranks' results, given the size of each rank's rows."""
    others, rank = blocks.others(), blocks.layout.rank
    sizes = [size(owner) for owner in range(blocks.layout.size)]
    yield from _scatter(others, sizes)
    yield from [Join(sizes[rank])] * len(others)
    yield from _all_gather(others, sizes, rank)


def _all_gather(others: list[int], sizes: list[int], rank: int) -> Iterator[Step]:
    """Yield the messages with my part to all others, the waits for theirs, and the joining."""
    yield from (Send(other, sizes[rank], BLOCKS, at_once=True) for other in others)
    yield from (Wait(other, BLOCKS, sizes[other], at_once=True) for other in others)
    yield Fill(sizes[rank])


def _scatter(others: list[int], sizes: list[int], unpacked: int = 0) -> Iterator[Step]:
    """Yield the messages with each owner's part, and the waits for the parts of mine."""
    yield from (Send(other, sizes[other], BLOCKS, at_once=True) for other in others)
    yield from (Wait(other, BLOCKS, unpacked, at_once=True) for other in others)
    if unpacked:
        yield Fill(unpacked)


_BY_SCHEDULE: dict[str, Callable[[Blocks], Iterator[Step]]] = {
    "lv-xattn": _lv_xattn,
    "ring": _ring,
    "grid": _grid,
    "ulysses": _ulysses,
    "gather": _gather,
    "replicated": _replicated_queries,
    "replicated keys": _replicated_keys,
}
