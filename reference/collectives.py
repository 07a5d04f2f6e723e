r"""How blocks move all at once: each rank with every other one, in the fewest bytes that do it.

    all_gather        my block to every rank                     P - 1 messages
    reduce_scatter    rows to their owner, joined there          P - 1 messages
    all_reduce        joined rows to every rank, in two steps    2 (P - 1) messages
    all_to_all        a part of its own to each rank             P - 1 messages

What joins two partial results is `merge_partials`, or `added` for plain sums.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from .exchange import Exchange
from .layout import share
from .merge import Array
from .meter import Block
from .wire import BLOCKS

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
    blocks = all_to_all(exchange, [list(arrays)] * exchange.layout.size, what)
    return [np.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True)]


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
    """Return partial results, joined over all ranks, on every rank alike.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    join : callable
        ``join(*a, *b)``: associative and commutative.
    *arrays : (B, H, S_Q, ...)
        This rank's results for all queries.
    """
    P, S_Q = exchange.layout.size, arrays[0].shape[2]
    rows = [share(S_Q, rank, P) for rank in range(P)]
    mine = _joined_rows(exchange, join, tuple(part.stop - part.start for part in rows), arrays)
    return tuple(all_gather(exchange, *mine))


def all_to_all(exchange: Exchange, parts: list[list[Array]], what: str) -> list[list[Array]]:
    """Give every rank a part, and return what all ranks gave to this one, in rank order.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    parts : list
        For each rank the arrays that it is to have.
    what : str
        What is waited for.
    """
    layout = exchange.layout
    received = [parts[layout.rank]] * layout.size
    for hop in range(1, layout.size):
        dest, source = layout.owner(-hop), layout.owner(hop)
        exchange.meter.sent(sum(x.nbytes for x in parts[dest]), dest, partial(Block, what))
        exchange.comm.send(parts[dest], dest, BLOCKS)
        with exchange.meter.waits(partial(Block, what, source=source)):
            received[source] = exchange.comm.recv(source, BLOCKS)
    return received


def added(*arrays: Array) -> tuple[Array, ...]:
    """Join two partial results by adding them."""
    half = len(arrays) // 2
    return tuple(a + b for a, b in zip(arrays[:half], arrays[half:], strict=True))


def _joined_rows(
    exchange: Exchange, join: Join, lengths: tuple[int, ...], arrays: tuple[Array, ...]
) -> tuple[Array, ...]:
    bounds = np.cumsum(lengths)[:-1]
    pieces = zip(*(np.split(x, bounds, axis=2) for x in arrays), strict=True)
    parts = [list(part) for part in pieces]
    first, *others = all_to_all(exchange, parts, "all ranks' results to be joined")
    result = tuple(first)
    for part in others:
        result = join(*result, *part)
    return result
