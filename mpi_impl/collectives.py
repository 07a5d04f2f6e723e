r"""How blocks move all at once: each rank with every other one, in the fewest bytes that do it.

    all_gather        my block to every rank                     P - 1 messages
    reduce_scatter    rows to their owner, joined there          P - 1 messages
    all_reduce        joined rows to every rank, in two steps    2 (P - 1) messages
    all_to_all        a part of its own to each rank             P - 1 messages

What joins two partial results is `merge_partials`, or `added` for sums; it becomes an `MPI.Op`, and
MPI may call it on any ranks' results, in any order.  The messages of a reduction are those of the
best algorithm; how many there really are, MPI decides.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from mpi4py import MPI

from lvxattn.reference.layout import share
from lvxattn.reference.meter import Block

from .buffers import buffer
from .exchange import Exchange, Field, Fields, cut, nbytes
from .merge import Array
from .rows import Rows, operator
from .transfers import Transfer, Transfers
from .watchdog import Pending, wait

Join = Callable[..., tuple[Array, ...]]

_TRADES = 7004  # a tag; 7003 is a command's


def all_gather(exchange: Exchange, *arrays: Array) -> list[Array]:
    """Return the blocks of all ranks, in rank order along axis 2.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    *arrays : (B, H, s_q, ...)
        This rank's block.
    """
    layout = exchange.layout

    def block(owner: int) -> list[Field]:
        rows = layout.s_q[owner]
        return [Field((*x.shape[:2], rows, *x.shape[3:]), x.dtype) for x in arrays]

    what = "all ranks' rows to be gathered"
    blocks = all_to_all(exchange, [list(arrays)] * layout.size, block, what)
    return [exchange.xp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True)]


def reduce_scatter(exchange: Exchange, join: Join, *arrays: Array) -> tuple[Array, ...]:
    """Return this rank's rows of partial results, joined over all ranks.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *arrays : (B, H, S_Q, ...), of one dtype
        This rank's results for all queries.
    """
    layout = exchange.layout
    bounds = list(accumulate(layout.s_q, initial=0))
    sent = Rows(exchange.xp, arrays, layout.s_q)
    mine = Rows(exchange.xp, arrays, [layout.s_q[layout.rank]])
    what = partial(Block, "all ranks' results to be joined")
    for owner, (start, stop) in enumerate(pairwise(bounds)):
        sent.put(owner, [x[:, :, start:stop] for x in arrays])
        if owner != layout.rank:
            exchange.meter.sent(sent.counts[owner] * sent.row_bytes, owner, what)
    with operator(join, arrays) as (op, row):
        (rows, packed), (room, empty) = sent.sendable(), mine.receivable()
        transfer = Transfer(
            lambda: exchange.comm.Ireduce_scatter(
                [rows, sum(sent.counts), row], [room, sum(mine.counts), row], sent.counts, op
            ),
            packed,
            empty,
        )
        _wait(exchange, transfer, what)
    return mine.arrays()


def all_reduce(exchange: Exchange, join: Join, *arrays: Array) -> tuple[Array, ...]:
    """Return partial results, joined over all ranks, on every rank alike.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *arrays : (B, H, S_Q, ...), of one dtype
        This rank's results for all queries.
    """
    layout = exchange.layout
    S_Q, what = arrays[0].shape[2], partial(Block, "all ranks' results to be joined")
    sent, result = (Rows(exchange.xp, arrays, [S_Q]) for _ in range(2))
    sent.put(0, arrays)
    shares = [share(S_Q, rank, layout.size) for rank in range(layout.size)]
    for rank, part in enumerate(shares):  # there and, joined, back
        if rank != layout.rank:
            for owner in (part, shares[layout.rank]):
                nbytes_each = sent.nbytes // max(1, S_Q)
                exchange.meter.sent(nbytes_each * (owner.stop - owner.start), rank, what)
    with operator(join, arrays) as (op, row):
        (rows, packed), (room, empty) = sent.sendable(), result.receivable()
        count = sum(sent.counts)
        transfer = Transfer(
            lambda: exchange.comm.Iallreduce([rows, count, row], [room, count, row], op),
            packed,
            empty,
        )
        _wait(exchange, transfer, what)
    return result.arrays()


def all_to_all(
    exchange: Exchange, parts: list[list[Array]], fields: Fields, what: str
) -> list[list[Array]]:
    """Give every rank a part, and return what all ranks gave to this one, in rank order.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    parts : list
        For each rank the arrays that it is to have.
    fields : callable
        Shapes and dtypes of what each rank gives to this one: MPI must know how much will come.
    what : str
        What is waited for.
    """
    layout, xp = exchange.layout, exchange.xp
    going = [[Field(x.shape, x.dtype) for x in part] for part in parts]
    coming = [fields(source) for source in range(layout.size)]
    going[layout.rank] = coming[layout.rank] = []  # what I give to myself stays where it is
    out, into = _Room(xp, going), _Room(xp, coming)
    for dest, views in enumerate(out.views()):
        for view, x in zip(views, parts[dest], strict=False):
            view[...] = x
    label = partial(Block, what)
    for dest, part in enumerate(going):
        if dest != layout.rank:
            exchange.meter.sent(nbytes(part), dest, label)
    out.buffer.filled()
    sent, whole = out.buffer.sendable(out.nbytes)
    room, empty = into.buffer.receivable(into.nbytes)
    # Point to point: an MPI that takes device memory there need not take it in collective calls.
    comm, rank, P = exchange.comm, layout.rank, layout.size
    transfers = []
    for step in range(1, P):
        source, dest = (rank - step) % P, (rank + step) % P
        if into.counts[source]:
            message = [into.part(room, source), MPI.BYTE]
            transfers.append(Transfer(partial(comm.Irecv, message, source, _TRADES), empty))
        if out.counts[dest]:
            message = [out.part(sent, dest), MPI.BYTE]
            transfers.append(Transfer(partial(comm.Isend, message, dest, _TRADES), whole))
    _wait(exchange, Transfers(transfers), label)
    into.buffer.deliver(into.nbytes)
    into.buffer.settle()
    received = into.views()
    received[layout.rank] = parts[layout.rank]
    return received


def added(*arrays: Array) -> tuple[Array, ...]:
    """Join two partial results by adding them."""
    half = len(arrays) // 2
    return tuple(a + b for a, b in zip(arrays[:half], arrays[half:], strict=True))


class _Room:
    """A buffer with a block for each rank; blocks begin where any dtype may."""

    def __init__(self, xp: Any, blocks: list[list[Field]]) -> None:
        self.blocks = blocks
        self.counts = [-(-nbytes(block) // 16) * 16 for block in blocks]
        *self.starts, self.nbytes = accumulate(self.counts, initial=0)
        self.buffer = buffer(xp, self.nbytes)

    def part(self, memory: Array, rank: int) -> Array:
        """Return a rank's bytes of `memory`, the buffer's or its twin."""
        return memory[self.starts[rank] : self.starts[rank] + self.counts[rank]]

    def views(self) -> list[list[Array]]:
        """Return every block's arrays."""
        memory = self.buffer.array
        return [cut(self.part(memory, rank), block) for rank, block in enumerate(self.blocks)]


def _wait(exchange: Exchange, transfer: Pending, what: Callable[[], Block]) -> None:
    with exchange.meter.waits(what):
        wait(transfer, exchange.watchdog, what)
