r"""How blocks travel all at once: every rank exchanges messages with every other one.

    all_gather        my block to every rank                     P - 1 messages
    reduce_scatter    rows to their owner, joined there          P - 1 messages
    all_reduce        joined rows to every rank, in two steps    2 (P - 1) messages
    all_to_all        a different block to each rank             P - 1 messages

Two partial results are joined by `merge_partials`, or by `added` where they are plain sums.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from lvxattn.common.layout import share
from lvxattn.common.meter import Block
from lvxattn.common.wire import BLOCKS

from .exchange import Exchange
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
    what = "all ranks' rows to be gathered"
    incoming = all_to_all(exchange, [list(arrays)] * exchange.P, what)
    # (B, H, S_Q, ...)
    return [np.concatenate(blocks, axis=2) for blocks in zip(*incoming, strict=True)]


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
    mine = _joined_rows(exchange, join, tuple(part.stop - part.start for part in rows), arrays)
    return tuple(all_gather(exchange, *mine))


def all_to_all(exchange: Exchange, outgoing: list[list[Array]], what: str) -> list[list[Array]]:
    """Send every rank its block, and return the blocks from all ranks, in rank order.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    outgoing : list
        For each rank the arrays of its block.
    what : str
        Name of the blocks, for the meter.
    """
    layout = exchange.layout
    incoming = [outgoing[exchange.rank]] * exchange.P
    for hop in range(1, exchange.P):
        dest, source = layout.owner(-hop), layout.owner(hop)
        exchange.meter.sent(sum(x.nbytes for x in outgoing[dest]), dest, partial(Block, what))
        exchange.comm.send(outgoing[dest], dest, BLOCKS)
        with exchange.meter.waits(partial(Block, what, source=source)):
            incoming[source] = exchange.comm.recv(source, BLOCKS)
    return incoming


def added(*arrays: Array) -> tuple[Array, ...]:
    """Join two partial results by adding them."""
    half = len(arrays) // 2
    return tuple(a + b for a, b in zip(arrays[:half], arrays[half:], strict=True))


def _joined_rows(
    exchange: Exchange, join: Join, lengths: tuple[int, ...], arrays: tuple[Array, ...]
) -> tuple[Array, ...]:
    bounds = np.cumsum(lengths)[:-1]
    outgoing = zip(*(np.split(x, bounds, axis=2) for x in arrays), strict=True)
    first, *others = all_to_all(
        exchange, list(map(list, outgoing)), "all ranks' results to be joined"
    )
    result = tuple(first)
    for block in others:
        result = join(*result, *block)
    return result
