r"""What every rank does in a pass, step by step: the schedules without their arrays.

The steps are those of `lv_xattn.py`, `ring_attention.py`, `ulysses.py`, `gather.py` and
`replicated.py`, in their order, so that what is sent is known to the byte before anything is sent,
and a pass can be played on the clocks of any machine (`simulate.py`).  A collective is one message
to and from each other rank: the fewest bytes that do it.  What a message of a backward is stamped
with, as torch_impl's are that go through the host, is counted too: `Layout.stamp_nbytes` each.  Not
foreseen, since shapes do not tell, is the forward that a backward of `reference` and `mpi_impl`
begins with where an lse is large.

Everything follows from a `Layout`: shapes, dtype, every rank's lengths, the order of the ring, the
masks that travel.

    lv-xattn    P - 1 hops of queries, P - 1 of results        ~ S_Q / P each
    ring        P - 1 hops of keys and values                  ~ S_KV / P each
    ulysses     1 / P of everything to every rank              ~ (S_Q + S_KV) / P^2 each
    gather      queries to every rank, results to their owner  ~ S_Q / P each
    replicated  rows of the result, joined, to every rank      ~ S_Q / P each
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

from lvxattn.reference.layout import Layout, share
from lvxattn.reference.wire import (
    ITEMSIZE,
    KEY_GRADIENTS,
    KEYS_VALUES,
    PARTIALS,
    QUERIES,
    QUERY_BLOCKS,
    QUERY_GRADIENTS,
)

BLOCKS, RESULTS = "blocks", "results"


@dataclass(frozen=True)
class Compute:
    """Attend from a block of queries to some keys.

    Attributes
    ----------
    s_q, s_kv : int
    heads : float
        The share of the heads.
    """

    s_q: int
    s_kv: int
    heads: float = 1.0


@dataclass(frozen=True)
class Fill:
    """Make room for sums, and fill it with zeros.

    Attributes
    ----------
    nbytes : int
    """

    nbytes: int


@dataclass(frozen=True)
class Send:
    """Hand a message to the network.

    Attributes
    ----------
    dest : int
    nbytes : int
    kind : str
        Messages of one kind from one rank to another arrive in order.
    packed : bool
        It is copied into a buffer first; what is only passed on lies in one.
    """

    dest: int
    nbytes: int
    kind: str
    packed: bool = True


@dataclass(frozen=True)
class Wait:
    """Wait for the next message of a kind from a rank.

    Attributes
    ----------
    source : int
    kind : str
    unpacked : int
        Bytes that are copied out of its buffer then.
    """

    source: int
    kind: str
    unpacked: int = 0


@dataclass(frozen=True)
class Join:
    """Merge, or add, partial results.

    Attributes
    ----------
    nbytes : int
        What has come.
    """

    nbytes: int


Step = Compute | Fill | Send | Wait | Join


def steps(layout: Layout, rank: int, *, backward: bool = False) -> list[Step]:
    """Return what a rank does in one pass.  Not collective.

    Parameters
    ----------
    layout : Layout
        Its schedule and its queries say what is done; whose view it is does not matter.
    rank : int
    backward : bool
        The backward pass, instead of the forward.

    Returns
    -------
    list of Compute, Fill, Send, Wait and Join
    """
    found = list(_BY_SCHEDULE[layout.way](Blocks(layout, backward), rank))
    if not backward:
        return found
    return [
        replace(step, nbytes=step.nbytes + layout.stamp_nbytes) if isinstance(step, Send) else step
        for step in found
    ]


def messages(layout: Layout, rank: int, *, backward: bool = False) -> list[Send]:
    """Return the messages that a rank sends in one pass.  Not collective.

    Parameters
    ----------
    layout, rank, backward
        As given to `steps`.

    Returns
    -------
    list of Send
    """
    return [s for s in steps(layout, rank, backward=backward) if isinstance(s, Send)]


@dataclass(frozen=True)
class Blocks:
    """How many bytes every rank's blocks have in a pass.

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
        """Return the size of a rank's keys and values, without their mask."""
        return KEYS_VALUES.nbytes(replace(self.layout, masks=(None,) * self.layout.size), owner)

    def key_gradients(self, owner: int) -> int:
        """Return the size of dk and dv."""
        return KEY_GRADIENTS.nbytes(self.layout, owner)

    def mask(self, owner: int, heads: int = 1) -> int:
        """Return the size of a rank's array mask, or of what one of `heads` parts of it takes."""
        kind = self.layout.masks[owner]
        if kind is None:
            return 0
        shape = (1,) * (4 - len(kind[0])) + kind[0]
        parts = heads if shape[1] > 1 else 1
        return prod(shape) * ITEMSIZE[kind[1]] // parts

    def home_cut(self, rank: int) -> int:
        """Return how many of a rank's keys its own queries meet before the hops."""
        return replace(self.layout, rank=rank).home_cut


def _lv_xattn(blocks: Blocks, rank: int) -> Iterator[Step]:
    layout, P = blocks.layout, blocks.layout.size
    at = layout.order.index(rank)
    owner = [layout.order[(at - hop) % P] for hop in range(P)]  # whose block is here, by hop
    left, right = owner[1 % P], layout.order[(at + 1) % P]
    mine, s_kv, s_q = layout.s_q[rank], layout.s_kv[rank], layout.s_q
    cut = blocks.home_cut(rank)
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    if P > 1:
        yield Send(right, blocks.queries(rank), BLOCKS)
    yield Compute(mine, cut)
    for hop in range(1, P):
        yield Wait(left, BLOCKS)
        if hop < P - 1:
            yield Send(right, blocks.queries(owner[hop]), BLOCKS, packed=False)
        yield Compute(s_q[owner[hop]], s_kv)
        part = blocks.result(owner[hop])
        if hop > 1:
            yield Wait(left, RESULTS)
            yield Join(part)
        yield Send(right, part, RESULTS)
    if P > 1:
        yield Compute(mine, s_kv - cut)
        yield Wait(left, RESULTS)
        yield Join(blocks.result(rank))


def _ring(blocks: Blocks, rank: int) -> Iterator[Step]:
    layout, P = blocks.layout, blocks.layout.size
    at = layout.order.index(rank)
    owner = [layout.order[(at - hop) % P] for hop in range(P)]
    left, right = owner[1 % P], layout.order[(at + 1) % P]
    mine, s_kv = layout.s_q[rank], layout.s_kv
    cut = blocks.home_cut(rank)
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    if P > 1:
        yield Send(right, blocks.keys(rank) + blocks.mask(rank), BLOCKS)
    yield Compute(mine, cut)
    if P > 1 and not blocks.backward:
        yield Compute(mine, s_kv[rank] - cut)
        yield Join(blocks.result(rank))
    for hop in range(1, P):
        yield Wait(left, BLOCKS)
        if hop < P - 1:
            passed_on = blocks.keys(owner[hop]) + blocks.mask(owner[hop])
            yield Send(right, passed_on, BLOCKS, packed=False)
        if blocks.backward:
            yield Fill(blocks.key_gradients(owner[hop]))
        yield Compute(mine, s_kv[owner[hop]])
        if not blocks.backward:
            yield Join(blocks.result(rank))
            continue
        part = blocks.key_gradients(owner[hop])
        if hop > 1:
            yield Wait(left, RESULTS)
            yield Join(part)
        yield Send(right, part, RESULTS)
    if blocks.backward and P > 1:
        yield Compute(mine, s_kv[rank] - cut)
        yield Wait(left, RESULTS)
        yield Join(blocks.key_gradients(rank))


def _ulysses(blocks: Blocks, rank: int) -> Iterator[Step]:
    layout, P = blocks.layout, blocks.layout.size
    others = _others(blocks, rank)
    there = [
        [blocks.queries(owner) // P for owner in range(P)],
        [blocks.keys(owner) // P for owner in range(P)],
    ]
    if any(layout.masks):
        there.append([blocks.mask(owner, heads=P) for owner in range(P)])
    for sizes in there:
        yield from _trade(others, [sizes[rank]] * len(others), [sizes[o] for o in others])
    if blocks.backward:
        yield Fill(sum(map(blocks.key_gradients, range(P))) // P)
    yield Compute(layout.S_Q, layout.S_KV, 1 / P)
    back = [[blocks.result(owner) // P for owner in range(P)]]
    if blocks.backward:
        back.append([blocks.key_gradients(owner) // P for owner in range(P)])
    for sizes in back:
        yield from _trade(others, [sizes[o] for o in others], [sizes[rank]] * len(others))


def _gather(blocks: Blocks, rank: int) -> Iterator[Step]:
    layout, others = blocks.layout, _others(blocks, rank)
    queries = [blocks.queries(owner) for owner in range(layout.size)]
    results = [blocks.result(owner) for owner in range(layout.size)]
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield from _trade(others, [queries[rank]] * len(others), [queries[o] for o in others])
    yield Compute(layout.S_Q, layout.s_kv[rank])
    yield from _trade(others, [results[o] for o in others])
    yield from [Join(results[rank])] * len(others)


def _replicated(blocks: Blocks, rank: int) -> Iterator[Step]:
    layout, others = blocks.layout, _others(blocks, rank)
    rows = [share(layout.S_Q, owner, layout.size) for owner in range(layout.size)]
    joined = replace(layout, s_q=tuple(part.stop - part.start for part in rows))
    sizes = [Blocks(joined, blocks.backward).result(owner) for owner in range(layout.size)]
    if blocks.backward:
        yield Fill(blocks.key_gradients(rank))
    yield Compute(layout.S_Q, layout.s_kv[rank])
    yield from _trade(others, [sizes[o] for o in others])
    yield from [Join(sizes[rank])] * len(others)
    yield from _trade(others, [sizes[rank]] * len(others), [sizes[o] for o in others])


def _trade(
    others: list[int], sizes: list[int], unpacked: list[int] | None = None
) -> Iterator[Step]:
    """Yield a message to every other rank, and the wait for all of theirs."""
    unpacked = unpacked or [0] * len(others)
    yield from (Send(dest, nbytes, BLOCKS) for dest, nbytes in zip(others, sizes, strict=True))
    yield from (Wait(o, BLOCKS, nbytes) for o, nbytes in zip(others, unpacked, strict=True))


def _others(blocks: Blocks, rank: int) -> list[int]:
    """Return the other ranks, beginning with the right neighbour, so that no two begin with one."""
    order = blocks.layout.order
    at = order.index(rank)
    return [order[(at + n) % len(order)] for n in range(1, len(order))]


_BY_SCHEDULE: dict[str, Callable[[Blocks, int], Iterator[Step]]] = {
    "lv-xattn": _lv_xattn,
    "ring": _ring,
    "ulysses": _ulysses,
    "gather": _gather,
    "replicated": _replicated,
}
