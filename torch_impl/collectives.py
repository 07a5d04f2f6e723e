r"""How blocks travel all at once: every rank exchanges messages with every other one.

    all_gather        my block to every rank                     P - 1 messages
    reduce_scatter    rows to their owner, joined there          P - 1 messages
    all_reduce        joined rows to every rank, in two steps    2 (P - 1) messages
    all_to_all        a different block to each rank             P - 1 messages

Two partial results are joined by `merge_partials`, or by `added` where they are plain sums.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist

from lvxattn.common.layout import share
from lvxattn.common.meter import Block
from lvxattn.common.wire import Field, Fields, cut, nbytes

from .exchange import Exchange, span
from .merge import Array

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
    return _gathered(exchange, exchange.layout.s_q, arrays)


def reduce_scatter(exchange: Exchange, join: Join, *arrays: Array) -> tuple[Array, ...]:
    """Return this rank's rows of partial results, joined over all ranks.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *arrays : (B, H, S_Q, ...)
        This rank's results for all queries.
    """
    return _joined_rows(exchange, join, exchange.layout.s_q, arrays)


def all_reduce(exchange: Exchange, join: Join, *arrays: Array) -> tuple[Array, ...]:
    """Return partial results joined over all ranks, the same on every rank.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *arrays : (B, H, S, ...)
        This rank's results for all queries, or for all keys.
    """
    P, S = exchange.P, arrays[0].shape[2]
    rows = [share(S, rank, P) for rank in range(P)]
    lengths = tuple(part.stop - part.start for part in rows)
    mine = _joined_rows(exchange, join, lengths, arrays)
    return tuple(_gathered(exchange, lengths, mine))


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
        For each rank the tensors of its block.
    fields : callable
        Shapes and dtypes of the block from each rank: PyTorch must know its size.
    what : str
        Name of the blocks, for the meter.
    """
    rank, P = exchange.rank, exchange.P
    if P == 1:
        return outgoing
    stamp = [] if exchange.stamp is None else [exchange.stamp]
    stamp_fields = [Field(tuple(x.shape), "uint8") for x in stamp]
    outgoing_fields = [[*map(Field.like, block), *stamp_fields] for block in outgoing]
    incoming_fields = [[*fields(source), *stamp_fields] for source in range(P)]
    outgoing_fields[rank] = incoming_fields[rank] = []  # my block for myself is not copied
    sent, room = (
        exchange.buffer(nbytes)[:nbytes]
        for nbytes in (sum(_counts(blocks)) for blocks in (outgoing_fields, incoming_fields))
    )
    for views, block in zip(_views(exchange, sent, outgoing_fields), outgoing, strict=True):
        for view, x in zip(views, [*block, *stamp], strict=False):
            view.copy_(x)
    label = partial(Block, what)
    for dest in range(P):
        if dest != rank:
            exchange.meter.sent(nbytes(outgoing_fields[dest]), dest, label)
    name = f"{exchange.layout.way}: all-to-all, {what}"
    group, counts = exchange.group, (_counts(incoming_fields), _counts(outgoing_fields))
    with group.waiting(label), span(name, sent.device), exchange.meter.waits(label):
        dist.all_to_all_single(room, sent, *counts, group=group.group)
    incoming = []
    for source, views in enumerate(_views(exchange, room, incoming_fields)):
        if stamp and views:
            exchange.check_stamp(views.pop(), Block(what, source=source))
        incoming.append([x.to(exchange.device) for x in views])
    incoming[rank] = outgoing[rank]
    return incoming


def added(*arrays: Array) -> tuple[Array, ...]:
    """Join two partial results by adding them."""
    half = len(arrays) // 2
    return tuple(a + b for a, b in zip(arrays[:half], arrays[half:], strict=True))


def _gathered(
    exchange: Exchange, lengths: tuple[int, ...], arrays: tuple[Array, ...]
) -> list[Array]:
    def fields(owner: int) -> list[Field]:
        return [Field.like(x, rows=lengths[owner]) for x in arrays]

    # gloo does not support an all-gather of blocks that differ in length.
    what = "all ranks' rows to be gathered"
    incoming = all_to_all(exchange, [list(arrays)] * exchange.P, fields, what)
    whole = [torch.cat(blocks, dim=2) for blocks in zip(*incoming, strict=True)]
    exchange.give_back()
    return whole  # (B, H, S_Q, ...)


def _joined_rows(
    exchange: Exchange, join: Join, lengths: tuple[int, ...], arrays: tuple[Array, ...]
) -> tuple[Array, ...]:
    def fields(_: int) -> list[Field]:
        return [Field.like(x, rows=lengths[exchange.rank]) for x in arrays]

    outgoing = zip(*(x.split(list(lengths), dim=2) for x in arrays), strict=True)
    first, *others = all_to_all(
        exchange, list(map(list, outgoing)), fields, "all ranks' results to be joined"
    )
    result = tuple(first)
    for block in others:
        result = join(*result, *block)
    exchange.give_back()
    return result


def _counts(blocks: list[list[Field]]) -> list[int]:
    """Return the bytes of each rank's block, rounded up to 16, so that the next suits any dtype."""
    return [-(-nbytes(block) // 16) * 16 for block in blocks]


def _views(exchange: Exchange, buffer: Array, blocks: list[list[Field]]) -> list[list[Array]]:
    """Return the tensors of every block, as views."""
    starts = accumulate(_counts(blocks), initial=0)
    return [
        cut(buffer[start:], block, exchange.dtype_of)
        for start, block in zip(starts, blocks, strict=False)
    ]
