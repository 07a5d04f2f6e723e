r"""Ring Attention: queries stay, the long blocks of keys and values travel round the ring.

The baseline that LV-XAttn is compared with, with the same tiles, merging and overlap.

Forward.  A rank attends from its own queries to its own keys and to every visiting block of keys.
No results travel.  Rank r of P = 4:

    hop        0 (home)      1           2           3           home again (backward)
    k, v       r             r-1         r-2         r-3         r, 2nd half
    sends      k, v of r     k, v r-1    k, v r-2    -           -
    and (backward)           dk dv r-1   dk dv r-2   dk dv r-3   -

Backward.  k and v travel round the ring again; dk and dv follow one hop behind, are added to on the
way and end at home after P - 1 hops.  dq is summed where the queries are.  As in LV-XAttn a rank
works on its own keys in two halves, which overlap with the first and the last transfer.

An array mask travels with its keys.  A callable stays, and is called on the keys of every rank.

Source: arXiv:2310.01889, algorithm 1.
"""

from typing import Any

from lvxattn.common.masks import MaskView
from lvxattn.common.wire import KEY_GRADIENTS, KEYS_VALUES

from .block_attention import block_attention_backward, partial_attention
from .exchange import Exchange
from .merge import Array, merge_partials


def ring_attention(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`.  Returns (out, top,
    total), merged over all ranks' keys.
    """
    blocks = exchange.rotation(KEYS_VALUES)
    (k1, v1, mask1), (k2, v2, mask2) = exchange.split_keys(k_shard, v_shard)
    P, scale = exchange.P, exchange.scale

    # 1. Send my keys and values; attention to them overlaps with the transfer.
    blocks.send(k_shard, v_shard, *travelling_mask(exchange.mask), hop=0)
    with exchange.computing(hop=0):
        mine = partial_attention(q, k1, v1, scale=scale, mask=mask1)
    if P > 1:
        # The backward works in the same halves, so that both passes round scores alike.
        with exchange.computing(hop=0):
            rest = partial_attention(q, k2, v2, scale=scale, mask=mask2)
        mine = merge_partials(*mine, *rest)

    for hop in blocks.comes:
        # 2. Receive a visiting block, and pass it on before computing with it.
        k_block, v_block, *mask_block = blocks.receive(hop)
        blocks.pass_on(hop)
        # 3. Attend from my queries to the visiting keys.
        mask = visiting_mask(exchange, mask_block, exchange.rank, blocks.owner(hop))
        with exchange.computing(hop):
            partial = partial_attention(q, k_block, v_block, scale=scale, mask=mask)
        # 4. Merge with the result for the keys before.
        mine = merge_partials(*mine, *partial)
    return mine


def ring_attention_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `ring_attention`, on more than one rank: `differentiate` is for one.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq,
    and dk and dv of this rank's keys, summed over all queries.
    """
    blocks, gradients = exchange.rotation(KEYS_VALUES), exchange.rotation(KEY_GRADIENTS)
    dk, dv = exchange.accumulators(k_shard, v_shard)
    # dk1, dv1, dk2 and dv2 are views: adding to them adds to dk and dv.
    (k1, v1, dk1, dv1, mask1), (k2, v2, dk2, dv2, mask2) = exchange.split_keys(
        k_shard, v_shard, dk, dv
    )
    P, scale, wanted = exchange.P, exchange.scale, exchange.wanted

    # 1. Send my keys and values; work on their first half overlaps with the transfer.
    blocks.send(k_shard, v_shard, *travelling_mask(exchange.mask), hop=0)
    with exchange.computing(hop=0):
        dq, *_ = block_attention_backward(
            dout, q, k1, v1, lse, delta, dk1, dv1,
            scale=scale, mask=mask1, wanted=wanted,
        )  # fmt: skip

    for hop in blocks.comes:
        # 2. Receive a visiting block, and pass it on before computing with it.
        k_block, v_block, *mask_block = blocks.receive(hop)
        blocks.pass_on(hop)
        # 3. Differentiate my queries' attention to the visiting keys, adding to dq.
        mask = visiting_mask(exchange, mask_block, exchange.rank, blocks.owner(hop))
        with exchange.computing(hop):
            dq_more, dk_block, dv_block = block_attention_backward(
                dout, q, k_block, v_block, lse, delta,
                scale=scale, mask=mask, wanted=wanted,
            )  # fmt: skip
        dq += dq_more
        # 4. Add the gradients from the ranks before, and send them after the block.
        if hop in gradients.comes:
            dk_before, dv_before = gradients.receive(hop)
            dk_block += dk_before
            dv_block += dv_before
        gradients.send(dk_block, dv_block, hop=hop)

    # 5. Work on the second half of my keys while their gradients come home.
    with exchange.computing(hop=0):
        rest, *_ = block_attention_backward(
            dout, q, k2, v2, lse, delta, dk2, dv2,
            scale=scale, mask=mask2, wanted=wanted,
        )  # fmt: skip
    dq += rest
    # 6. Add the other ranks' gradients of my keys.
    if P in gradients.comes:
        dk_others, dv_others = gradients.receive(P)
        dk += dk_others
        dv += dv_others
    return dq, dk, dv


def travelling_mask(mask: Any) -> list[Array]:
    """Return the tensors of a mask that travel with its keys: one, or none for a callable."""
    return [mask] if isinstance(mask, Array) else []


def visiting_mask(
    exchange: Exchange, mask_block: list[Array], q_owner: int, kv_owner: int
) -> MaskView:
    """Return the mask of visiting keys over some queries: the received array or the callable."""
    rule = None if isinstance(exchange.mask, Array) else exchange.mask
    mask = mask_block[0] if mask_block else rule
    return exchange.layout.view(mask, q_owner, kv_owner)
