r"""Grid: queries travel along columns of ranks, keys along rows.

LV-XAttn and Ring Attention are the ends of one family.  P = a b ranks stand in a grid: queries
visit the a ranks of their column, keys and values the b ranks of their row, so that every block of
queries meets every block of keys on one rank.  a = P is LV-XAttn, b = P is Ring Attention; between
them a rank sends less than either where neither side is short.  a = 2, b = 3:

                  column 0    column 1    column 2
    row 0         rank 0      rank 2      rank 4        k, v of ranks 0, 2 and 4 go round this row
    row 1         rank 1      rank 3      rank 5
                  q of ranks 0 and 1 go round this column, and their results

Here columns are neighbours, and so lie inside hosts; where keys weigh more, rows are, and ranks 0,
1 and 2 stand in row 0 (`Layout.inside`).  Below, `comes` has the hops after which a block of a
rotation stops on this rank, `owner` tells whose it is, and `size` is the length of its ring.

Forward.  While my own keys are here, the queries of my column come, are worked on, and are kept.
All of them meet every block of keys that comes.  While the last keys are here, their results are
sent round the column, merged on the way, and end at home:

    keys of                my own           row's next       ...    row's last
    q blocks of column     come, are kept   are all here            are all here
    results                                                         travel, a - 1 hops

For its own queries a rank cuts its own keys in two: attention to the first half overlaps with the
first transfers, attention to the second half with the last transfer of results.

Backward.  q, dout, lse and delta go round the column, and dq home as the results did; k and v go
round the row, and dk and dv follow one hop behind, are added to on the way and end at home.

An array mask travels with its keys.  A callable stays, and is called on the keys of other ranks.

Elements that a rank sends forward:  (a - 1) s_q H (D + D_V + 2) + (b - 1) s_kv H_KV (D + D_V).

Source: arXiv:2503.15758 and arXiv:2512.20968, for self-attention.
"""

from lvxattn.common.wire import (
    KEY_GRADIENTS,
    KEYS_VALUES,
    PARTIALS,
    QUERIES,
    QUERY_BLOCKS,
    QUERY_GRADIENTS,
)

from .block_attention import block_attention_backward, partial_attention
from .exchange import Exchange
from .merge import Array, merge_partials
from .ring_attention import travelling_mask, visiting_mask


def grid(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`.  Returns (out, top,
    total), merged over all ranks' keys.
    """
    queries, keys = exchange.rotation(QUERIES), exchange.rotation(KEYS_VALUES)
    partials = exchange.rotation(PARTIALS)
    (k1, v1, mask1), (k2, v2, mask2) = exchange.split_keys(k_shard, v_shard)
    P, scale = exchange.P, exchange.scale
    k, v, mask_block = k_shard, v_shard, travelling_mask(exchange.mask)
    column: dict[int, Array] = {}
    results: dict[int, tuple[Array, Array, Array]] = {}

    # 1. Send my queries and my keys; attention to the first half of my keys overlaps with it.
    queries.send(q, hop=0)
    keys.send(k, v, *mask_block, hop=0)
    with exchange.computing(hop=0):
        mine = partial_attention(q, k1, v1, scale=scale, mask=mask1)

    for key_hop in range(keys.size):
        if key_hop in keys.comes:
            # 2. Receive visiting keys, and pass them on before computing with them.
            k, v, *mask_block = keys.receive(key_hop)
            keys.pass_on(key_hop)
            # 3. Attend from my queries to the visiting keys.
            mask = visiting_mask(exchange, mask_block, exchange.rank, keys.owner(key_hop))
            with exchange.computing(hop=0):
                partial = partial_attention(q, k, v, scale=scale, mask=mask)
            mine = merge_partials(*mine, *partial)
        for hop in queries.comes:
            if key_hop == 0:
                # 4. Receive a visiting block of queries, pass it on, and keep it.
                (q_block,) = queries.receive(hop)
                queries.pass_on(hop)
                column[hop] = q_block.clone()
            if key_hop == 0 or key_hop in keys.comes:
                # 5. Attend from the visiting queries to the keys that are here.
                mask = visiting_mask(exchange, mask_block, queries.owner(hop), keys.owner(key_hop))
                with exchange.computing(hop):
                    partial = partial_attention(column[hop], k, v, scale=scale, mask=mask)
                if key_hop > 0:
                    partial = merge_partials(*results[hop], *partial)
                results[hop] = partial
            if key_hop == keys.size - 1:
                # 6. Merge with the result of the ranks before, and send it after the block.
                del column[hop]
                partial = results.pop(hop)
                if hop in partials.comes:
                    partial = merge_partials(*partial, *partials.receive(hop))
                partials.send(*partial, hop=hop)

    if P > 1:
        # 7. Attend to the second half of my keys while the result for my queries comes home.
        with exchange.computing(hop=0):
            rest = partial_attention(q, k2, v2, scale=scale, mask=mask2)
        mine = merge_partials(*mine, *rest)
    # 8. Merge with the other ranks' result for my queries.
    if queries.size in partials.comes:
        mine = merge_partials(*mine, *partials.receive(queries.size))
    return mine


def grid_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `grid`, on more than one rank: `differentiate` is for one.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq,
    and dk and dv of this rank's keys, summed over all queries.
    """
    blocks, keys = exchange.rotation(QUERY_BLOCKS), exchange.rotation(KEYS_VALUES)
    dqs, dkvs = exchange.rotation(QUERY_GRADIENTS), exchange.rotation(KEY_GRADIENTS)
    dk, dv = exchange.accumulators(k_shard, v_shard)
    # dk1, dv1, dk2 and dv2 are views: adding to them adds to dk and dv.
    (k1, v1, dk1, dv1, mask1), (k2, v2, dk2, dv2, mask2) = exchange.split_keys(
        k_shard, v_shard, dk, dv
    )
    P, scale, wanted = exchange.P, exchange.scale, exchange.wanted
    k, v, mask_block = k_shard, v_shard, travelling_mask(exchange.mask)
    dk_block, dv_block = dk, dv
    column: dict[int, list[Array]] = {}
    sums: dict[int, Array] = {}

    # 1. Send my block and my keys; work on the first half of my keys overlaps with it.
    blocks.send(q, dout, lse, delta, hop=0)
    keys.send(k, v, *mask_block, hop=0)
    with exchange.computing(hop=0):
        dq, *_ = block_attention_backward(
            dout, q, k1, v1, lse, delta, dk1, dv1,
            scale=scale, mask=mask1, wanted=wanted,
        )  # fmt: skip

    for key_hop in range(keys.size):
        if key_hop in keys.comes:
            # 2. Receive visiting keys, and pass them on before computing with them.
            k, v, *mask_block = keys.receive(key_hop)
            keys.pass_on(key_hop)
            # 3. Differentiate my queries' attention to them, into sums of their own.
            dk_block, dv_block = exchange.accumulators(k, v)
            mask = visiting_mask(exchange, mask_block, exchange.rank, keys.owner(key_hop))
            with exchange.computing(hop=0):
                dq_more, *_ = block_attention_backward(
                    dout, q, k, v, lse, delta, dk_block, dv_block,
                    scale=scale, mask=mask, wanted=wanted,
                )  # fmt: skip
            dq += dq_more
        for hop in blocks.comes:
            if key_hop == 0:
                # 4. Receive a visiting block, pass it on, and keep it.
                block = blocks.receive(hop)
                blocks.pass_on(hop)
                column[hop] = [x.clone() for x in block]
            if key_hop == 0 or key_hop in keys.comes:
                # 5. Differentiate the visiting queries' attention, adding to dk and dv.
                q_block, dout_block, lse_block, delta_block = column[hop]
                mask = visiting_mask(exchange, mask_block, blocks.owner(hop), keys.owner(key_hop))
                with exchange.computing(hop):
                    dq_block, *_ = block_attention_backward(
                        dout_block, q_block, k, v, lse_block, delta_block, dk_block, dv_block,
                        scale=scale, mask=mask, wanted=wanted,
                    )  # fmt: skip
                if key_hop > 0:
                    dq_block += sums[hop]
                sums[hop] = dq_block
            if key_hop == keys.size - 1:
                # 6. Add the gradient from the ranks before, and send it after the block.
                del column[hop]
                dq_block = sums.pop(hop)
                if hop in dqs.comes:
                    dq_block += dqs.receive(hop)[0]
                dqs.send(dq_block, hop=hop)
        if key_hop in keys.comes:
            # 7. Add the gradients from the ranks before, and send them after the keys.
            if key_hop in dkvs.comes:
                dk_before, dv_before = dkvs.receive(key_hop)
                dk_block += dk_before
                dv_block += dv_before
            dkvs.send(dk_block, dv_block, hop=key_hop)

    if P > 1:
        # 8. Work on the second half of my keys while gradients come home.
        with exchange.computing(hop=0):
            rest, *_ = block_attention_backward(
                dout, q, k2, v2, lse, delta, dk2, dv2,
                scale=scale, mask=mask2, wanted=wanted,
            )  # fmt: skip
        dq += rest
    # 9. Add the other ranks' gradients of my queries and of my keys.
    if blocks.size in dqs.comes:
        dq += dqs.receive(blocks.size)[0]
    if keys.size in dkvs.comes:
        dk_others, dv_others = dkvs.receive(keys.size)
        dk += dk_others
        dv += dv_others
    return dq, dk, dv
