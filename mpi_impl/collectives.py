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

from lvxattn.mpi_impl.device import buffer
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
    rows = [_packed([x[:, :, a:b] for x in arrays], exchange.xp) for a, b in pairwise(bounds)]
    mine = np.empty_like(rows[layout.rank])
    what = partial(Block, "all ranks' results to be joined")
    for owner, part in enumerate(rows):
        if owner != layout.rank:
            exchange.meter.sent(part.nbytes, owner, what)
    with _operator(join, arrays) as (op, row):
        sent = np.concatenate(rows)
        request = exchange.comm.Ireduce_scatter(
            [sent, len(sent), row], [mine, len(mine), row], [len(part) for part in rows], op
        )
        _wait(exchange, request, what)
    return _unpacked(mine, arrays, layout.s_q[layout.rank], exchange.xp)


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
    sent = _packed(list(arrays), exchange.xp)
    result = np.empty_like(sent)
    S_Q, what = arrays[0].shape[2], partial(Block, "all ranks' results to be joined")
    rows = [share(S_Q, rank, layout.size) for rank in range(layout.size)]
    for rank, part in enumerate(rows):  # there and, joined, back
        if rank != layout.rank:
            for owner in (part, rows[layout.rank]):
                row_bytes = sent.nbytes // max(1, S_Q)
                exchange.meter.sent(row_bytes * (owner.stop - owner.start), rank, what)
    with _operator(join, arrays) as (op, row):
        request = exchange.comm.Iallreduce([sent, len(sent), row], [result, len(result), row], op)
        _wait(exchange, request, what)
    return _unpacked(result, arrays, S_Q, exchange.xp)


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
    sent, room = out.buffer.sendable(out.nbytes), into.buffer.receivable(into.nbytes)
    request = exchange.comm.Ialltoallv(
        [sent, (out.counts, out.starts), MPI.BYTE], [room, (into.counts, into.starts), MPI.BYTE]
    )
    _wait(exchange, request, label)
    into.buffer.deliver(into.nbytes)
    into.buffer.receivable(0)  # a copy to the device may still read the pinned memory
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


def _packed(arrays: Sequence[Array], xp: Any) -> Array:
    """Return the rows of arrays in host memory, where MPI calls the operator."""
    on_host = [x if xp is np else xp.asnumpy(x) for x in arrays]
    columns, width = _columns(arrays)
    rows = np.empty((prod(arrays[0].shape[:3]), width), on_host[0].dtype)
    for column, x in zip(columns, on_host, strict=True):
        rows[column] = x.reshape(rows[column].shape)
    return rows


def _unpacked(rows: Array, like: Sequence[Array], length: int, xp: Any) -> tuple[Array, ...]:
    columns, _ = _columns(like)
    parts = zip(columns, like, strict=True)
    return tuple(
        xp.asarray(rows[column].reshape(*x.shape[:2], length, *x.shape[3:])) for column, x in parts
    )


def _wait(exchange: Exchange, request: MPI.Request, what: Callable[[], Block]) -> None:
    exchange.meter.waits(wait, what)(request, exchange.watchdog, what)
