r"""Ring Attention: queries stay, the long blocks of keys and values go round the ring.

The baseline that LV-XAttn is measured against, with the same tiles, merging and overlap.  Forward.
A rank attends from its own queries to every visiting block of keys; nothing follows, for the
results are already at home.  Rank r, P = 4:

    hop        0 (home)      1           2           3           home again (backward)
    k, v       of r          of r-1      of r-2      of r-3      of r, 2nd part
    sends      k, v of r     of r-1      of r-2      -           -
    and (backward)           dk dv r-1   dk dv r-2   dk dv r-3   -

Backward.  k and v go round again; dk and dv follow one hop behind, are added to on the way and end
at home, after P - 1 hops like everything else.  dq is summed where the queries are.

An array mask belongs to the keys and travels with them; a callable stays, and is asked about the
keys of every rank.

Source: arXiv:2310.01889, algorithm 1.
"""

from typing import Any

from lvxattn.reference.masks import MaskView
from lvxattn.reference.wire import KEY_GRADIENTS, KEYS_VALUES

from .block_attention import block_attention_backward, partial_attention
from .exchange import Exchange
from .lv_xattn import lengthen
from .merge import Array, merge_partials


def ring_attention(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`; what is returned is a
    partial result over all keys: out, top and total.
    """
    blocks = exchange.rotation(KEYS_VALUES)
    (k1, v1, mask1), (k2, v2, mask2) = exchange.split_home(k_shard, v_shard)
    P, scale = exchange.P, exchange.scale

    # 1. Send my keys and values on; my own work hides their way.
    blocks.send(k_shard, v_shard, *travelling(exchange.mask))
    with exchange.computing(hop=0):
        mine = partial_attention(q, k1, v1, scale=scale, mask=mask1)
    if P > 1:
        # Cut as the backward cuts it: scores are then rounded in the same way.
        with exchange.computing(hop=0):
            rest = partial_attention(q, k2, v2, scale=scale, mask=mask2)
        mine = merge_partials(*mine, *rest)

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        k_block, v_block, *mask_block = blocks.receive()
        if hop < P - 1:
            blocks.forward()
        # 3. Attend from my queries to the visiting keys.
        with exchange.computing(hop):
            part = partial_attention(
                q, k_block, v_block, scale=scale, mask=visiting(exchange, mask_block, hop)
            )
        # 4. Merge with what the blocks before gave.
        mine = merge_partials(*mine, *part)
    return mine


def ring_attention_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `ring_attention`.

    Collective: every rank calls this.  delta (`delta_of`) takes the place of out and dlse; dk and
    dv are those of my keys, summed over all queries.
    """
    blocks, gradients = exchange.rotation(KEYS_VALUES), exchange.rotation(KEY_GRADIENTS, start=1)
    (k1, v1, mask1), (k2, v2, mask2) = exchange.split_home(k_shard, v_shard)
    P, scale = exchange.P, exchange.scale

    # 1. Send my keys and values on; the first part of my own work hides their way.
    blocks.send(k_shard, v_shard, *travelling(exchange.mask))
    with exchange.computing(hop=0):
        dq, dk, dv = block_attention_backward(
            dout, q, k1, v1, lse, delta, scale=scale, mask=mask1,
            dtype=k_shard.dtype if P == 1 else exchange.wide,  # alone, nothing is added to them
        )  # fmt: skip
    if P > 1:
        dk, dv = lengthen(dk, k_shard), lengthen(dv, v_shard)

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        k_block, v_block, *mask_block = blocks.receive()
        if hop < P - 1:
            blocks.forward()
        # 3. Differentiate my queries' attention to the visiting keys; dq is added to here.
        with exchange.computing(hop):
            part, dk_block, dv_block = block_attention_backward(
                dout, q, k_block, v_block, lse, delta,
                scale=scale, mask=visiting(exchange, mask_block, hop),
            )  # fmt: skip
        dq += part
        # 4. Add to it what the ranks before me found, and send it after the block.
        if hop > 1:
            dk_before, dv_before = gradients.receive()
            dk_block += dk_before
            dv_block += dv_before
        gradients.send(dk_block, dv_block)

    if P > 1:
        # 5. The rest of my own work hides the way home of its gradients.
        with exchange.computing(hop=0):
            rest, dk2, dv2 = block_attention_backward(
                dout, q, k2, v2, lse, delta, scale=scale, mask=mask2
            )
        dq += rest
        dk[:, :, exchange.layout.home_cut :] += dk2
        dv[:, :, exchange.layout.home_cut :] += dv2
        # 6. Add what all the others found for my keys.
        dk_others, dv_others = gradients.receive()
        dk += dk_others
        dv += dv_others
    return dq, dk, dv


def travelling(mask: Any) -> list[Array]:
    """Return what of a mask travels with its keys: a tensor, nothing else."""
    return [mask] if isinstance(mask, Array) else []


def visiting(exchange: Exchange, mask_block: list[Array], hop: int) -> MaskView:
    """Return the mask of the visiting keys over my queries: it came along, or is a rule."""
    rule = None if isinstance(exchange.mask, Array) else exchange.mask
    mask = mask_block[0] if mask_block else rule
    return exchange.layout.view(mask, exchange.rank, exchange.layout.owner(hop))
