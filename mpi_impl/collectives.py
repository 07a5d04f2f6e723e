r"""How blocks travel all at once: every rank exchanges messages with every other one.

    all_gather        my block to every rank                     P - 1 messages
    reduce_scatter    rows to their owner, joined there          P - 1 messages
    all_reduce        joined rows to every rank, in two steps    2 (P - 1) messages
    all_to_all        a different block to each rank             P - 1 messages

Two partial results are joined by `merge_partials`, or by `added` where they are plain sums.  Here
that function becomes an `MPI.Op`, which MPI may apply to any ranks' results in any order.  The
messages counted for a reduction are those of the best algorithm; MPI may use another.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

from mpi4py import MPI

from lvxattn.common.layout import share
from lvxattn.common.meter import Block
from lvxattn.common.wire import Field, Fields, cut, nbytes

from .exchange import Exchange
from .merge import Array
from .transport.reduce_op import Rows, operator
from .transport.transfers import Transfer, Transfers
from .transport.watchdog import Pending, wait

Join = Callable[..., tuple[Array, ...]]

_RESULTS = partial(Block, "all ranks' results to be joined")
_ALL_TO_ALL = 7004  # a tag; commands use 7003 and 7006, the watchdog 7005


def all_gather(exchange: Exchange, *arrays: Array) -> list[Array]:
    """Return the blocks of all ranks, in rank order along axis 2.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    *arrays : (B, H, s_q, ...)
        This rank's block.
    """

    def fields(owner: int) -> list[Field]:
        return [Field.like(x, rows=exchange.layout.s_q[owner]) for x in arrays]

    what = "all ranks' rows to be gathered"
    incoming = all_to_all(exchange, [list(arrays)] * exchange.P, fields, what)
    whole = [exchange.xp.concatenate(blocks, axis=2) for blocks in zip(*incoming, strict=True)]
    exchange.give_back()
    return whole  # (B, H, S_Q, ...)


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
    s_q = exchange.layout.s_q
    sent, mine = (Rows(exchange.buffer, arrays, lengths) for lengths in (s_q, [s_q[exchange.rank]]))
    for owner, (first, end) in enumerate(pairwise(accumulate(s_q, initial=0))):
        sent.put(owner, [x[:, :, first:end] for x in arrays])
        if owner != exchange.rank:
            exchange.meter.sent(sent.counts[owner] * sent.row_bytes, owner, _RESULTS)
    start = partial(exchange.comm.Ireduce_scatter, recvcounts=sent.counts)
    return _reduced(exchange, join, sent, mine, start)


def all_reduce(exchange: Exchange, join: Join, *arrays: Array) -> tuple[Array, ...]:
    """Return partial results joined over all ranks, the same on every rank.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *arrays : (B, H, S, ...), of one dtype
        This rank's results for all queries, or for all keys.
    """
    S = arrays[0].shape[2]
    sent, result = (Rows(exchange.buffer, arrays, [S]) for _ in range(2))
    sent.put(0, arrays)
    row_nbytes = sent.nbytes // max(1, S)
    shares = [share(S, rank, exchange.P) for rank in range(exchange.P)]
    for rank, part in enumerate(shares):  # to their owner and, joined, back
        if rank != exchange.rank:
            for rows in (part, shares[exchange.rank]):
                exchange.meter.sent(row_nbytes * (rows.stop - rows.start), rank, _RESULTS)
    return _reduced(exchange, join, sent, result, exchange.comm.Iallreduce)


def all_to_all(
    exchange: Exchange, outgoing: list[list[Array]], fields: Fields, what: str
) -> list[list[Array]]:
    """Send every rank its block, and return the blocks from all ranks, in rank order.

    Collective: every rank of the exchange calls this.  Blocks from other ranks are views of a
    buffer, valid until `exchange.give_back`.

    Parameters
    ----------
    exchange : Exchange
    outgoing : list
        For each rank the arrays of its block.
    fields : callable
        Shapes and dtypes of the block from each rank: MPI must know its size.
    what : str
        Name of the blocks, for the meter.
    """
    comm, rank, P = exchange.comm, exchange.rank, exchange.P
    outgoing_fields = [[Field.like(x) for x in block] for block in outgoing]
    incoming_fields = [fields(source) for source in range(P)]
    outgoing_fields[rank] = incoming_fields[rank] = []  # my block for myself is not copied
    out, into = _Room(exchange, outgoing_fields), _Room(exchange, incoming_fields)
    for views, block in zip(out.views(), outgoing, strict=True):
        for view, x in zip(views, block, strict=False):
            view[...] = x
    label = partial(Block, what)
    for dest in range(P):
        if dest != rank:
            exchange.meter.sent(nbytes(outgoing_fields[dest]), dest, label)
    out.buffer.filled()
    sent, whole = out.buffer.sendable(out.nbytes)
    room, empty = into.buffer.receivable(into.nbytes)
    # Point to point: an MPI may accept device memory here, and not in collective calls.
    transfers = []
    for step in range(1, P):
        source, dest = (rank - step) % P, (rank + step) % P
        if into.counts[source]:
            message = [into.part(room, source), MPI.BYTE]
            transfers.append(Transfer(partial(comm.Irecv, message, source, _ALL_TO_ALL), empty))
        if out.counts[dest]:
            message = [out.part(sent, dest), MPI.BYTE]
            transfers.append(Transfer(partial(comm.Isend, message, dest, _ALL_TO_ALL), whole))
    _wait(exchange, Transfers(transfers), label)
    into.buffer.deliver(into.nbytes)
    into.buffer.settle()
    incoming = into.views()
    incoming[rank] = outgoing[rank]
    return incoming


def added(*arrays: Array) -> tuple[Array, ...]:
    """Join two partial results by adding them."""
    half = len(arrays) // 2
    return tuple(a + b for a, b in zip(arrays[:half], arrays[half:], strict=True))


def _reduced(
    exchange: Exchange, join: Join, sent: Rows, result: Rows, start: Callable[..., MPI.Request]
) -> tuple[Array, ...]:
    """Join rows over all ranks by the call of MPI that `start` makes, and unpack the result."""
    with operator(join, sent.like) as (op, row):
        (rows, packed), (room, empty) = sent.sendable(), result.receivable()
        ends = [rows, sum(sent.counts), row], [room, sum(result.counts), row]
        _wait(exchange, Transfer(lambda: start(*ends, op=op), packed, empty), _RESULTS)
    joined = result.arrays()
    exchange.give_back()
    return joined


class _Room:
    """A buffer with a block for each rank, at multiples of 16 bytes, which suit any dtype."""

    def __init__(self, exchange: Exchange, blocks: list[list[Field]]) -> None:
        self.exchange, self.blocks = exchange, blocks
        self.counts = [-(-nbytes(block) // 16) * 16 for block in blocks]
        *self.starts, self.nbytes = accumulate(self.counts, initial=0)
        self.buffer = exchange.buffer(self.nbytes)

    def part(self, memory: Array, rank: int) -> Array:
        """Return a rank's bytes of `memory`, the buffer's on the device or on the host."""
        return memory[self.starts[rank] : self.starts[rank] + self.counts[rank]]

    def views(self) -> list[list[Array]]:
        """Return the arrays of every block."""
        parts = (self.part(self.buffer.array, rank) for rank in range(len(self.blocks)))
        return [
            cut(part, block, self.exchange.dtype_of)
            for part, block in zip(parts, self.blocks, strict=True)
        ]


def _wait(exchange: Exchange, transfer: Pending, what: Callable[[], Block]) -> None:
    with exchange.meter.waits(what):
        wait(transfer, exchange.watchdog, what)
