r"""Ulysses: ranks trade lengths for heads, and attend to all keys with a share of the heads.

The way of DeepSpeed-Ulysses.  Rank r of P, before and after the trade:

    q (B, H, s_q, D)           ->    (B, H / P, S_Q, D)
    k (B, H_KV, s_kv, D)       ->    (B, H_KV / P, S_KV, D)

    1  all-to-all    q, k, v: of each rank's heads, my part    all lengths of my heads
    2  attend        nothing is merged: all keys are here
    3  all-to-all    results: each rank's rows                 all heads of my queries

P has to divide H_KV, and the long keys travel: 1 / P of them to each rank.  A rank's share of the
results is whole, so that nothing has to be merged.

Backward.  Everything is traded again, with dout, lse and delta; dq, dk and dv are traded back.

An array mask's columns travel with the keys, of its heads only the receiver's.  A callable stays:
it is asked about the keys of every rank, and must be the same rule on all.

Source: arXiv:2309.14509, section 3.
"""

import numpy as np

from .block_attention import block_attention_backward, partial_attention
from .collectives import all_to_all
from .exchange import Exchange
from .masks import MaskView
from .merge import Array

WHAT = "this rank's heads of all queries"


def ulysses(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`; what is returned is a
    partial result over all keys: out, top and total.
    """
    s_q, s_kv = exchange.layout.s_q, exchange.layout.s_kv
    # 1. Trade: all lengths of my heads for all heads of my lengths.
    (q_heads,) = to_heads(exchange, s_q, q)
    k_heads, v_heads = to_heads(exchange, s_kv, k_shard, v_shard)
    view = heads_view(exchange)
    # 2. Attend from my heads of all queries to all keys.
    with exchange.computing(what=WHAT):
        part = partial_attention(q_heads, k_heads, v_heads, scale=exchange.scale, mask=view)
    # 3. Trade back.
    out, top, total = to_lengths(exchange, s_q, *part)
    return out, top, total


def ulysses_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `ulysses`.

    Collective: every rank calls this.  delta (`delta_of`) takes the place of out and dlse; dk and
    dv are those of my keys, summed over all queries.
    """
    s_q, s_kv = exchange.layout.s_q, exchange.layout.s_kv
    # 1. Trade: all lengths of my heads for all heads of my lengths.
    q_heads, dout_heads, lse_heads, delta_heads = to_heads(exchange, s_q, q, dout, lse, delta)
    k_heads, v_heads = to_heads(exchange, s_kv, k_shard, v_shard)
    view = heads_view(exchange)
    # 2. Differentiate my heads' attention to all keys.
    dk_heads, dv_heads = exchange.accumulators(k_heads, v_heads)
    with exchange.computing(what=WHAT):
        dq_heads = block_attention_backward(
            dout_heads, q_heads, k_heads, v_heads, lse_heads, delta_heads, dk_heads, dv_heads,
            scale=exchange.scale, mask=view,
        )  # fmt: skip
    # 3. Trade back.
    (dq,) = to_lengths(exchange, s_q, dq_heads)
    dk, dv = to_lengths(exchange, s_kv, dk_heads, dv_heads)
    return dq, dk, dv


def to_heads(exchange: Exchange, lengths: tuple[int, ...], *arrays: Array) -> list[Array]:
    """Give every rank its heads of my arrays; return mine of all ranks', joined along axis 2.

    Collective: every rank of the exchange calls this.  `lengths` are those of all ranks' arrays.
    """
    parts = [np.split(x, len(lengths), axis=1) for x in arrays]
    pieces = [list(part) for part in zip(*parts, strict=True)]
    received = all_to_all(exchange, pieces, "all ranks' heads to be traded")
    return [np.concatenate(blocks, axis=2) for blocks in zip(*received, strict=True)]


def to_lengths(exchange: Exchange, lengths: tuple[int, ...], *arrays: Array) -> list[Array]:
    """Give every rank its lengths of my heads; return mine of all heads, joined along axis 1.

    Collective: every rank of the exchange calls this.  `lengths` are those that ranks are to have.
    """
    parts = [np.split(x, np.cumsum(lengths)[:-1], axis=2) for x in arrays]
    pieces = [list(part) for part in zip(*parts, strict=True)]
    received = all_to_all(exchange, pieces, "all ranks' results to be traded")
    return [np.concatenate(blocks, axis=1) for blocks in zip(*received, strict=True)]


def heads_view(exchange: Exchange) -> MaskView:
    """Return the mask of all ranks' keys, as this rank's heads see it."""
    layout, mask = exchange.layout, exchange.mask
    first = layout.rank * (layout.H // layout.size)
    if callable(mask) or not any(layout.masks):
        return MaskView(mask, h_start=first)
    parts: list[list[Array]] = [[] for _ in range(layout.size)]
    if mask is not None and not callable(mask):
        four = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        split = np.split(four, layout.size, axis=1) if four.shape[1] > 1 else [four] * layout.size
        parts = [[part] for part in split]
    received = all_to_all(exchange, parts, "all ranks' masks to be traded")
    return MaskView(joined([block[0] if block else None for block in received], layout.s_kv))


def joined(masks: list[Array | None], s_kv: tuple[int, ...]) -> Array:
    """Join the masks of all ranks' keys along the last axis; None hides nothing.

    Bool if all are, else additive.
    """
    arrays = [
        np.ones((1, 1, 1, n), bool) if m is None else m for m, n in zip(masks, s_kv, strict=True)
    ]
    if any(m.dtype != bool for m in arrays):
        arrays = [np.where(m, 0.0, -np.inf) if m.dtype == bool else m for m in arrays]
    rows = np.broadcast_shapes(*(m.shape[:3] for m in arrays))
    return np.concatenate([np.broadcast_to(m, (*rows, m.shape[3])) for m in arrays], axis=3)
