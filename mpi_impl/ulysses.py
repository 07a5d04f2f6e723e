r"""Ulysses: ranks exchange rows for heads, and attend to all keys with a share of the heads.

The method of DeepSpeed-Ulysses.  Rank r of P, before and after the exchange:

    q (B, H, s_q, D)           ->    (B, H / P, S_Q, D)
    k (B, H_KV, s_kv, D)       ->    (B, H_KV / P, S_KV, D)

    step               sends                            receives
    1  all-to-all      q, k, v: to each rank its heads  all rows of my heads
    2  attend
    3  all-to-all      results: to each rank its rows   all heads of my queries

P must divide H_KV, and the long keys travel, 1 / P of them to each rank.  All keys of a head are on
one rank, so that no results have to be merged.

Backward.  The same exchange, of dout, lse and delta too; dq, dk and dv return by another.

An array mask travels with its keys, its heads to their ranks.  A callable stays: it is called on
the keys of every rank, and must be the same on all ranks.

Source: arXiv:2309.14509, section 3.
"""

from itertools import accumulate
from typing import Any

import numpy as np

from lvxattn.common.masks import MaskView
from lvxattn.common.wire import Field, mask_fields

from .block_attention import block_attention_backward, partial_attention
from .collectives import all_to_all
from .exchange import Exchange
from .merge import Array

# The meter's name of this work.
WHAT = "this rank's heads of all queries"


def ulysses(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`.  Returns (out, top,
    total), merged over all ranks' keys.
    """
    s_q, s_kv = exchange.layout.s_q, exchange.layout.s_kv
    # 1. Exchange: from all heads of my rows to all rows of my heads.
    (q_heads,) = to_heads(exchange, s_q, q)
    k_heads, v_heads = to_heads(exchange, s_kv, k_shard, v_shard)
    mask_view = mask_view_of_heads(exchange)
    # 2. Attend from my heads of all queries to all keys.
    with exchange.computing(what=WHAT):
        partial = partial_attention(
            q_heads, k_heads, v_heads, scale=exchange.scale, mask=mask_view,
            progress=exchange.progress,
        )  # fmt: skip
    # 3. Exchange back.
    out, top, total = to_rows(exchange, s_q, *partial)
    return out, top, total


def ulysses_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `ulysses`.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq,
    and dk and dv of this rank's keys, summed over all queries.
    """
    s_q, s_kv = exchange.layout.s_q, exchange.layout.s_kv
    # 1. Exchange: from all heads of my rows to all rows of my heads.
    q_heads, dout_heads, lse_heads, delta_heads = to_heads(exchange, s_q, q, dout, lse, delta)
    k_heads, v_heads = to_heads(exchange, s_kv, k_shard, v_shard)
    mask_view = mask_view_of_heads(exchange)
    # 2. Differentiate the attention of my heads to all keys.
    dk_heads, dv_heads = exchange.accumulators(k_heads, v_heads)
    with exchange.computing(what=WHAT):
        dq_heads = block_attention_backward(
            dout_heads, q_heads, k_heads, v_heads, lse_heads, delta_heads, dk_heads, dv_heads,
            scale=exchange.scale, mask=mask_view, wanted=exchange.wanted,
            progress=exchange.progress,
        )  # fmt: skip
    # 3. Exchange back.
    dq, dk, dv = dq_heads, dk_heads, dv_heads
    if "q" in exchange.wanted:
        (dq,) = to_rows(exchange, s_q, dq)
    if "k" in exchange.wanted:
        dk, dv = to_rows(exchange, s_kv, dk, dv)
    return dq, dk, dv


def to_heads(exchange: Exchange, lengths: tuple[int, ...], *arrays: Array) -> list[Array]:
    """Return all ranks' rows of my heads, given all heads of my rows.

    Collective: every rank of the exchange calls this.

    Parameters
    ----------
    exchange : Exchange
    lengths : tuple of int
        The number of rows of each rank.
    *arrays : (B, H, s, ...)
    """
    xp, P = exchange.xp, exchange.P

    def fields(owner: int) -> list[Field]:
        return [Field.like(x, heads=x.shape[1] // P, rows=lengths[owner]) for x in arrays]

    outgoing = zip(*(xp.split(x, P, axis=1) for x in arrays), strict=True)
    incoming = all_to_all(exchange, list(map(list, outgoing)), fields, "all ranks' heads")
    whole = [xp.concatenate(blocks, axis=2) for blocks in zip(*incoming, strict=True)]
    exchange.give_back()
    return whole  # (B, H / P, S, ...)


def to_rows(exchange: Exchange, lengths: tuple[int, ...], *arrays: Array) -> list[Array]:
    """Return all heads of my rows, given all ranks' rows of my heads: undo `to_heads`.

    Collective: every rank of the exchange calls this.
    """
    xp, bounds = exchange.xp, list(accumulate(lengths))[:-1]

    def fields(_: int) -> list[Field]:
        return [Field.like(x, rows=lengths[exchange.rank]) for x in arrays]

    outgoing = zip(*(xp.split(x, bounds, axis=2) for x in arrays), strict=True)
    incoming = all_to_all(exchange, list(map(list, outgoing)), fields, "all ranks' results")
    whole = [xp.concatenate(blocks, axis=1) for blocks in zip(*incoming, strict=True)]
    exchange.give_back()
    return whole  # (B, H, s, ...)


def mask_view_of_heads(exchange: Exchange) -> MaskView:
    """Return the mask of all ranks' keys for this rank's heads.

    Collective where any rank has an array mask.
    """
    layout, mask, P = exchange.layout, exchange.mask, exchange.P
    if callable(mask) or not any(layout.masks):
        return MaskView(mask, h_start=exchange.rank * (layout.H // P))
    outgoing: list[list[Array]] = [[]] * P
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # (B, H, S_Q, s_kv), or 1 for some
        mask = mask if mask.dtype == bool else mask.astype(layout.accumulator, copy=False)
        heads = exchange.xp.split(mask, P, axis=1) if mask.shape[1] > 1 else [mask] * P
        outgoing = [[part] for part in heads]
    incoming = all_to_all(
        exchange, outgoing, lambda owner: mask_fields(layout, owner, P), "all ranks' masks"
    )
    masks = [block[0] if block else None for block in incoming]
    return MaskView(joined(masks, layout.s_kv, exchange.xp))


def joined(masks: list[Array | None], s_kv: tuple[int, ...], xp: Any) -> Array:
    """Join the masks of all ranks' keys along the last axis; None hides nothing.

    bool if all masks are, else additive.
    """
    arrays = [
        xp.ones((1, 1, 1, n), bool) if m is None else m for m, n in zip(masks, s_kv, strict=True)
    ]
    if any(m.dtype != bool for m in arrays):
        arrays = [xp.where(m, 0.0, -np.inf) if m.dtype == bool else m for m in arrays]
    rows = np.broadcast_shapes(*(m.shape[:3] for m in arrays))
    # (..., S_KV)
    return xp.concatenate([xp.broadcast_to(m, (*rows, m.shape[3])) for m in arrays], axis=3)
