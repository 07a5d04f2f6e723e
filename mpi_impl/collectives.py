r"""How blocks move all at once: each rank with every other one, in the fewest bytes that do it.

    all_gather        my block to every rank                     P - 1 messages
    reduce_scatter    rows to their owner, joined there          P - 1 messages
    all_reduce        joined rows to every rank, in two steps    2 (P - 1) messages
    all_to_all        a part of its own to each rank             P - 1 messages

What joins two partial results is `merge`, or `added` for plain sums; it becomes an `MPI.Op`, and
MPI may call it on any ranks' results, in any order.  The messages are those of the best algorithm;
how many there really are, MPI decides.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl.buffers import Ready, Transfer, buffer
from lvxattn.mpi_impl.exchange import Exchange, Field, Fields, cut, nbytes
from lvxattn.mpi_impl.watchdog import wait
from lvxattn.reference.layout import share
from lvxattn.reference.meter import Block

Array = Any
Join = Callable[..., tuple[Array, ...]]


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
        return [((*x.shape[:2], rows, *x.shape[3:]), x.dtype) for x in arrays]

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
        What this rank has to say to all queries.
    """
    layout = exchange.layout
    bounds = list(accumulate(layout.s_q, initial=0))
    sent = _Rows(exchange.xp, arrays, layout.s_q)
    mine = _Rows(exchange.xp, arrays, [layout.s_q[layout.rank]])
    what = partial(Block, "all ranks' results to be joined")
    for owner, (start, stop) in enumerate(pairwise(bounds)):
        sent.put(owner, [x[:, :, start:stop] for x in arrays])
        if owner != layout.rank:
            exchange.meter.sent(sent.counts[owner] * sent.row_bytes, owner, what)
    with _operator(join, arrays) as (op, row):
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
        What this rank has to say to all queries.
    """
    layout = exchange.layout
    S_Q, what = arrays[0].shape[2], partial(Block, "all ranks' results to be joined")
    sent, result = (_Rows(exchange.xp, arrays, [S_Q]) for _ in range(2))
    sent.put(0, arrays)
    shares = [share(S_Q, rank, layout.size) for rank in range(layout.size)]
    for rank, part in enumerate(shares):  # there and, joined, back
        if rank != layout.rank:
            for owner in (part, shares[layout.rank]):
                nbytes_each = sent.nbytes // max(1, S_Q)
                exchange.meter.sent(nbytes_each * (owner.stop - owner.start), rank, what)
    with _operator(join, arrays) as (op, row):
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
    going = [[(x.shape, x.dtype) for x in part] for part in parts]
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
    (sent, whole), (room, empty) = (
        out.buffer.sendable(out.nbytes),
        into.buffer.receivable(into.nbytes),
    )
    transfer = Transfer(
        lambda: exchange.comm.Ialltoallv(
            [sent, (out.counts, out.starts), MPI.BYTE], [room, (into.counts, into.starts), MPI.BYTE]
        ),
        whole,
        empty,
    )
    _wait(exchange, transfer, label)
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

    def views(self) -> list[list[Array]]:
        """Return every block's arrays."""
        array = self.buffer.array
        return [
            cut(array[start : start + count], block)
            for start, count, block in zip(self.starts, self.counts, self.blocks, strict=True)
        ]


class _Rows:
    """Rows of partial results: out and lse of one query in each, where MPI's operator may read.

    On a device they are packed by kernels, and always go through the host: MPI calls the operator
    there.

    Parameters
    ----------
    xp : module
    like : sequence of (B, H, s_q, ...)
        Arrays of the shapes, but for their lengths, and the dtype that are to be packed.
    lengths : sequence of int
        How many queries each part has.
    """

    def __init__(self, xp: Any, like: Sequence[Array], lengths: Sequence[int]) -> None:
        self.xp, self.like, self.lengths = xp, like, lengths
        self.columns, width = _columns(like)
        self.counts = [prod(like[0].shape[:2]) * length for length in lengths]
        *self.starts, count = accumulate(self.counts, initial=0)
        self.row_bytes = width * like[0].dtype.itemsize
        self.nbytes = count * self.row_bytes
        self.buffer = buffer(xp, self.nbytes, direct=False)
        self.rows = self.buffer.array.view(like[0].dtype).reshape(count, width)

    def put(self, part: int, arrays: Sequence[Array]) -> None:
        """Write one part."""
        rows = self._part(part)
        for column, x in zip(self.columns, arrays, strict=True):
            view = rows[column]
            view[...] = x.reshape(view.shape)

    def sendable(self) -> tuple[Array, Ready]:
        """Return the rows for MPI, all parts having been put."""
        self.buffer.filled()
        return self.buffer.sendable(self.nbytes)

    def receivable(self) -> tuple[Array, Ready]:
        """Return the room for what MPI receives."""
        return self.buffer.receivable(self.nbytes)

    def arrays(self) -> tuple[Array, ...]:
        """Return what MPI has received, the only part."""
        self.buffer.deliver(self.nbytes)
        self.buffer.settle()
        (length,) = self.lengths
        return tuple(
            self.xp.ascontiguousarray(self.rows[column].reshape(*x.shape[:2], length, *x.shape[3:]))
            for column, x in zip(self.columns, self.like, strict=True)
        )

    def _part(self, part: int) -> Array:
        start = self.starts[part]
        return self.rows[start : start + self.counts[part]]


@contextmanager
def _operator(join: Join, arrays: tuple[Array, ...]) -> Iterator[tuple[MPI.Op, MPI.Datatype]]:
    """Make the MPI.Op that joins rows, and the datatype of a row: out and lse of one query.

    Both are freed in the end: MPI has few operators.
    """
    dtype, columns, width = np.dtype(str(arrays[0].dtype)), *_columns(arrays)

    def joined(a: Any, b: Any, _: MPI.Datatype) -> None:
        rows_a, rows_b = (np.frombuffer(x, dtype).reshape(-1, width) for x in (a, b))
        result = join(*(rows_a[c] for c in columns), *(rows_b[c] for c in columns))
        for column, x in zip(columns, result, strict=True):
            rows_b[column] = x  # in place: where MPI expects the result

    row = MPI.Datatype.fromcode(dtype.char).Create_contiguous(width).Commit()
    op = MPI.Op.Create(joined, commute=True)
    try:
        yield op, row
    finally:
        op.Free()
        row.Free()


def _columns(arrays: Sequence[Array]) -> tuple[list[Any], int]:
    """Return where in a row each array's numbers are, and how long a row is."""
    columns: list[Any] = []
    end = 0
    for x in arrays:
        wide = len(x.shape) == 4
        columns.append(np.s_[:, end : end + x.shape[3]] if wide else np.s_[:, end])
        end += x.shape[3] if wide else 1
    return columns, end


def _wait(exchange: Exchange, transfer: Transfer, what: Callable[[], Block]) -> None:
    exchange.meter.waits(wait, what)(transfer, exchange.watchdog, what)
