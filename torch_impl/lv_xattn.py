r"""LV-XAttn: keys and values stay, the short query blocks travel round the ring.

Forward.  A rank attends to its own keys, from its own queries and from every visiting block.  The
partial result follows its block one hop behind, is merged on the way and ends at home.  Rank r of
P = 4:

    hop               0           1           2           3           (home work)
    q block           r           r-1         r-2         r-3         r
    keys              1st half    all         all         all         2nd half
    sends q of        r           r-1         r-2         -           -
    sends result of   -           r-1         r-2         r-3         -
    receives q of     r-1         r-2         r-3         -           -
    receives result   -           r-2         r-3         r           -

What a rank receives at one hop it works on at the next.  Queries make P - 1 hops and results P - 1,
as few as an all-gather and a reduce-scatter need.  For its own queries a rank cuts its own *keys*
in two: attention to the first half overlaps with the first transfer of queries, attention to the
second half with the last transfer of results.  One rank alone has all keys in the first half.

Backward.  delta = rowsum(dout * out) - dlse is computed once, at home, so that out need not travel.
q, dout, lse and delta travel round the ring, dq follows as the result did, and dk and dv are summed
where the keys are.

Source: arXiv:2502.02406, algorithm 1.  The hop order and the key cut are not in the paper.
"""

from lvxattn.common.wire import PARTIALS, QUERIES, QUERY_BLOCKS, QUERY_GRADIENTS

from .block_attention import block_attention_backward, partial_attention
from .exchange import Exchange
from .merge import Array, merge_partials


def lv_xattn(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`.  Returns (out, top,
    total), merged over all ranks' keys.
    """
    queries, partials = exchange.rotation(QUERIES), exchange.rotation(PARTIALS)
    (k1, v1, mask1), (k2, v2, mask2) = exchange.split_keys(k_shard, v_shard)
    P, scale = exchange.P, exchange.scale

    # 1. Send my queries; attention to the first half of my keys overlaps with the transfer.
    queries.send(q, hop=0)
    with exchange.computing(hop=0):
        mine = partial_attention(q, k1, v1, scale=scale, mask=mask1)

    for hop in queries.comes:
        # 2. Receive a visiting block, and pass it on before computing with it.
        (q_block,) = queries.receive(hop)
        queries.pass_on(hop)
        # 3. Attend from the visiting queries to my keys.
        with exchange.computing(hop):
            partial = partial_attention(
                q_block, k_shard, v_shard, scale=scale, mask=exchange.mask_view(hop)
            )
        # 4. Merge with the result of the ranks before, and send it after the block.
        if hop in partials.comes:
            partial = merge_partials(*partial, *partials.receive(hop))
        partials.send(*partial, hop=hop)

    if P > 1:
        # 5. Attend to the second half of my keys while the result for my queries comes home.
        with exchange.computing(hop=0):
            rest = partial_attention(q, k2, v2, scale=scale, mask=mask2)
        mine = merge_partials(*mine, *rest)
    # 6. Merge with the other ranks' result for my queries.
    if P in partials.comes:
        mine = merge_partials(*mine, *partials.receive(P))
    return mine


def lv_xattn_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `lv_xattn`, on more than one rank: `differentiate` is for one.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq,
    and dk and dv of this rank's keys, summed over all queries.
    """
    blocks, gradients = exchange.rotation(QUERY_BLOCKS), exchange.rotation(QUERY_GRADIENTS)
    dk, dv = exchange.accumulators(k_shard, v_shard)
    # dk1, dv1, dk2 and dv2 are views: adding to them adds to dk and dv.
    (k1, v1, dk1, dv1, mask1), (k2, v2, dk2, dv2, mask2) = exchange.split_keys(
        k_shard, v_shard, dk, dv
    )
    P, scale, wanted = exchange.P, exchange.scale, exchange.wanted

    # 1. Send my block; work on the first half of my keys overlaps with the transfer.
    blocks.send(q, dout, lse, delta, hop=0)
    with exchange.computing(hop=0):
        dq, *_ = block_attention_backward(
            dout, q, k1, v1, lse, delta, dk1, dv1,
            scale=scale, mask=mask1, wanted=wanted,
        )  # fmt: skip

    for hop in blocks.comes:
        # 2. Receive a visiting block, and pass it on before computing with it.
        q_block, dout_block, lse_block, delta_block = blocks.receive(hop)
        blocks.pass_on(hop)
        # 3. Differentiate the visiting queries' attention to my keys, adding to dk and dv.
        with exchange.computing(hop):
            dq_block, *_ = block_attention_backward(
                dout_block, q_block, k_shard, v_shard, lse_block, delta_block, dk, dv,
                scale=scale, mask=exchange.mask_view(hop), wanted=wanted,
            )  # fmt: skip
        # 4. Add the gradient from the ranks before, and send it after the block.
        if hop in gradients.comes:
            dq_block += gradients.receive(hop)[0]
        gradients.send(dq_block, hop=hop)

    # 5. Work on the second half of my keys while the gradient of my queries comes home.
    with exchange.computing(hop=0):
        rest, *_ = block_attention_backward(
            dout, q, k2, v2, lse, delta, dk2, dv2,
            scale=scale, mask=mask2, wanted=wanted,
        )  # fmt: skip
    dq += rest
    # 6. Add the other ranks' gradient of my queries.
    if P in gradients.comes:
        dq += gradients.receive(P)[0]
    return dq, dk, dv
