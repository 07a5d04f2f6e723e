r"""How blocks move all at once: each rank with every other one, in the fewest bytes that do it.

    all_gather        my block to every rank                     P - 1 messages
    reduce_scatter    rows to their owner, joined there          P - 1 messages
    all_reduce        joined rows to every rank, in two steps    2 (P - 1) messages
    all_to_all        a part of its own to each rank             P - 1 messages

What joins two partial results is `merge_partials`, or `added` for plain sums.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from lvxattn.reference.layout import share
from lvxattn.reference.meter import Block

from .exchange import Exchange, Field, Fields, cut, nbytes, span

Join = Callable[..., tuple[Tensor, ...]]


def all_gather(exchange: Exchange, *tensors: Tensor) -> list[Tensor]:
    """Return the blocks of all ranks, in rank order along axis 2.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    *tensors : (B, H, s_q, ...)
        This rank's block.
    """
    return _gathered(exchange, exchange.layout.s_q, tensors)


def reduce_scatter(exchange: Exchange, join: Join, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return this rank's rows of partial results, joined over all ranks.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *tensors : (B, H, S_Q, ...)
        This rank's results for all queries.
    """
    return _joined_rows(exchange, join, exchange.layout.s_q, tensors)


def all_reduce(exchange: Exchange, join: Join, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return partial results, joined over all ranks, on every rank alike.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *tensors : (B, H, S_Q, ...)
        This rank's results for all queries.
    """
    P, S_Q = exchange.layout.size, tensors[0].shape[2]
    rows = [share(S_Q, rank, P) for rank in range(P)]
    lengths = tuple(part.stop - part.start for part in rows)
    mine = _joined_rows(exchange, join, lengths, tensors)
    return tuple(_gathered(exchange, lengths, mine))


def all_to_all(
    exchange: Exchange, parts: list[list[Tensor]], fields: Fields, what: str
) -> list[list[Tensor]]:
    """Give every rank a part, and return what all ranks gave to this one, in rank order.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    parts : list
        For each rank the tensors that it is to have.
    fields : callable
        Shapes and dtypes of what each rank gives to this one: it is known how much will come.
    what : str
        What is waited for.
    """
    layout, group = exchange.layout, exchange.group
    if layout.size == 1:
        return parts
    stamp = [] if exchange.stamp is None else [exchange.stamp]
    given = [[*part, *stamp] for part in parts]
    going = [_fields(part) for part in given]
    coming = [[*fields(source), *_fields(stamp)] for source in range(layout.size)]
    going[layout.rank] = coming[layout.rank] = []  # what I give to myself stays where it is
    device = torch.device("cpu") if exchange.staged else exchange.device
    sent, room = (_room(blocks, device) for blocks in (going, coming))
    for dest, views in enumerate(_views(sent, going)):
        for view, x in zip(views, given[dest], strict=False):
            view.copy_(x)
    label = partial(Block, what)
    for dest, part in enumerate(going):
        if dest != layout.rank:
            exchange.meter.sent(nbytes(part), dest, label)
    name = f"{layout.way}: all-to-all, {what}"
    with group.waiting(label), span(name, device), exchange.meter.waits(label):
        dist.all_to_all_single(room, sent, _counts(coming), _counts(going), group=group.group)
    received = []
    for source, views in enumerate(_views(room, coming)):
        if stamp and views:
            exchange.check_stamp(views.pop(), Block(what, source=source))
        received.append([x.to(exchange.device) for x in views])
    received[layout.rank] = parts[layout.rank]
    return received


def added(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Join two partial results by adding them."""
    half = len(tensors) // 2
    return tuple(a + b for a, b in zip(tensors[:half], tensors[half:], strict=True))


def _gathered(
    exchange: Exchange, lengths: tuple[int, ...], tensors: tuple[Tensor, ...]
) -> list[Tensor]:
    def block(owner: int) -> list[Field]:
        return [Field((*x.shape[:2], lengths[owner], *x.shape[3:]), x.dtype) for x in tensors]

    # gloo refuses an all-gather of blocks that differ in length.
    blocks = all_to_all(
        exchange, [list(tensors)] * len(lengths), block, "all ranks' rows to be gathered"
    )
    return [torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True)]


def _joined_rows(
    exchange: Exchange, join: Join, lengths: tuple[int, ...], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    mine = lengths[exchange.layout.rank]

    def block(_: int) -> list[Field]:
        return [Field((*x.shape[:2], mine, *x.shape[3:]), x.dtype) for x in tensors]

    pieces = zip(*(x.split(list(lengths), dim=2) for x in tensors), strict=True)
    parts = [list(part) for part in pieces]
    first, *others = all_to_all(exchange, parts, block, "all ranks' results to be joined")
    result = tuple(first)
    for part in others:
        result = join(*result, *part)
    return result


def _fields(tensors: list[Tensor]) -> list[Field]:
    return [Field(tuple(x.shape), x.dtype) for x in tensors]


def _counts(blocks: list[list[Field]]) -> list[int]:
    """Return how many bytes each rank's block takes; it begins where any dtype may."""
    return [-(-nbytes(block) // 16) * 16 for block in blocks]


def _room(blocks: list[list[Field]], device: torch.device) -> Tensor:
    return torch.empty(sum(_counts(blocks)), dtype=torch.uint8, device=device)


def _views(buffer: Tensor, blocks: list[list[Field]]) -> list[list[Tensor]]:
    """Return every block's tensors, as views."""
    starts = accumulate(_counts(blocks), initial=0)
    return [cut(buffer[start:], block) for start, block in zip(starts, blocks, strict=False)]
