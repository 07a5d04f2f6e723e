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

from functools import partial

import torch
from torch import Tensor

from lvxattn.reference.masks import MaskRule, MaskView
from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import block_attention_backward, partial_attention
from lvxattn.torch_impl.collectives import all_to_all
from lvxattn.torch_impl.exchange import Exchange, Field
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout


def ulysses(
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    group: Group,
    layout: Layout,
    *,
    mask: Tensor | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank of the group calls this.  Arguments are those of `cross_attention`,
    checked against the layout; the result is a partial one, over all keys: out, top and total.
    Autograd sees nothing of it.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(
        partial(partial_attention, scale=layout.scale), "this rank's heads of all queries"
    )

    # 1. Trade: all lengths of my heads for all heads of my lengths.
    (q_heads,) = to_heads(exchange, layout.s_q, q)
    k_heads, v_heads = to_heads(exchange, layout.s_kv, k_shard, v_shard)
    view = heads_view(exchange, mask)
    # 2. My heads of all queries, over all keys.
    part = attend(0, q_heads, k_heads, v_heads, mask=view)
    # 3. Trade back.
    out, top, total = to_lengths(exchange, layout.s_q, *part)
    return out, top, total


def ulysses_backward(
    dout: Tensor,
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    lse: Tensor,
    delta: Tensor,
    group: Group,
    layout: Layout,
    *,
    mask: Tensor | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `ulysses`.

    Collective: every rank of the group calls this.  Arguments are those of the forward, with delta
    in place of out and dlse (`delta_of`); dk and dv are those of this rank's keys, summed over all
    queries in the accumulator dtype.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale), "this rank's heads of all queries"
    )

    # 1. Trade: all lengths of my heads for all heads of my lengths.
    q_heads, dout_heads, lse_heads, delta_heads = to_heads(
        exchange, layout.s_q, q, dout, lse, delta
    )
    k_heads, v_heads = to_heads(exchange, layout.s_kv, k_shard, v_shard)
    view = heads_view(exchange, mask)
    # 2. My heads of all queries, over all keys.
    dq_heads, dk_heads, dv_heads = attend(
        0, dout_heads, q_heads, k_heads, v_heads, lse_heads, delta_heads, mask=view
    )
    # 3. Trade back.
    (dq,) = to_lengths(exchange, layout.s_q, dq_heads)
    dk, dv = to_lengths(exchange, layout.s_kv, dk_heads, dv_heads)
    return dq, dk, dv


def to_heads(exchange: Exchange, lengths: tuple[int, ...], *tensors: Tensor) -> list[Tensor]:
    """Give every rank its heads of my tensors; return mine of all ranks', joined along axis 2.

    Collective: every rank of the exchange calls this.  `lengths` are those of all ranks' tensors.
    """
    P = len(lengths)

    def block(owner: int) -> list[Field]:
        heads = [(x.shape[0], x.shape[1] // P, lengths[owner], *x.shape[3:]) for x in tensors]
        return [(shape, x.dtype) for shape, x in zip(heads, tensors, strict=True)]

    parts = zip(*(x.chunk(P, dim=1) for x in tensors), strict=True)
    received = all_to_all(exchange, [list(part) for part in parts], block, "all ranks' heads")
    return [torch.cat(blocks, dim=2) for blocks in zip(*received, strict=True)]


def to_lengths(exchange: Exchange, lengths: tuple[int, ...], *tensors: Tensor) -> list[Tensor]:
    """Give every rank its lengths of my heads; return mine of all heads, joined along axis 1.

    Collective: every rank of the exchange calls this.  `lengths` are those that ranks are to have.
    """
    mine = lengths[exchange.layout.rank]

    def block(_: int) -> list[Field]:
        return [((*x.shape[:2], mine, *x.shape[3:]), x.dtype) for x in tensors]

    parts = zip(*(x.split(list(lengths), dim=2) for x in tensors), strict=True)
    received = all_to_all(exchange, [list(part) for part in parts], block, "all ranks' results")
    return [torch.cat(blocks, dim=1) for blocks in zip(*received, strict=True)]


def heads_view(exchange: Exchange, mask: Tensor | MaskRule | None) -> MaskView:
    """Return the mask of all ranks' keys, as this rank's heads see it."""
    layout = exchange.layout
    P, first = layout.size, layout.rank * (layout.H // layout.size)
    if callable(mask) or not any(layout.masks):
        return MaskView(mask, h_start=first)

    def block(owner: int) -> list[Field]:
        if (kind := layout.masks[owner]) is None:
            return []
        four = (1,) * (4 - len(kind[0])) + kind[0]
        return [((four[0], -(-four[1] // P), *four[2:]), getattr(torch, kind[1]))]

    parts: list[list[Tensor]] = [[] for _ in range(P)]
    if isinstance(mask, Tensor):
        four = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        four = four if four.dtype == torch.bool else four.to(getattr(torch, layout.accumulator))
        chunks = four.chunk(P, dim=1) if four.shape[1] > 1 else [four] * P
        parts = [[part] for part in chunks]
    received = all_to_all(exchange, parts, block, "all ranks' masks")
    masks = [part[0] if part else None for part in received]
    return MaskView(joined(masks, layout.s_kv, exchange.device))


def joined(masks: list[Tensor | None], s_kv: tuple[int, ...], device: torch.device) -> Tensor:
    """Join the masks of all ranks' keys along the last axis; None hides nothing.

    Bool if all are, else additive.
    """
    tensors = [
        torch.ones((1, 1, 1, n), dtype=torch.bool, device=device) if m is None else m
        for m, n in zip(masks, s_kv, strict=True)
    ]
    wide = [m.dtype for m in tensors if m.dtype != torch.bool]
    if wide:
        zero = torch.zeros((), dtype=wide[0], device=device)
        tensors = [
            torch.where(m, zero, -torch.inf) if m.dtype == torch.bool else m for m in tensors
        ]
    rows = torch.broadcast_shapes(*(m.shape[:3] for m in tensors))
    return torch.cat([m.expand(*rows, m.shape[3]) for m in tensors], dim=3)
