r"""LV-XAttn: keys and values stay, the short query blocks go round the ring.

Forward.  A rank attends from every visiting block to its own keys; its partial
result follows it one hop behind, is merged on the way and ends at home.  Rank r, P = 4:

    hop        0 (home)      1           2           3           home again
    q block    r, 1st part   r-1         r-2         r-3         r, 2nd part
    sends      q of r        q of r-1    q of r-2    -           -
    and                      result r-1  result r-2  result r-3  -
    receives   q of r-1      q of r-2    q of r-3    result r
                             result r-2  result r-3

Queries make P - 1 hops and results P - 1, as few as an all-gather and a reduce-scatter would need.
Work on the rank's own block is cut in two, so that the first hop of the queries and the last hop of
the results have something to hide behind.

Backward.  delta = rowsum(dout * out) - dlse is computed once, at home, so that out need not travel;
q, dout, lse and delta go round, dq follows as the result did, dk and dv are summed where the keys
are.

Source: arXiv:2502.02406, algorithm 1; hops and the cut are this project's.
"""

import torch

from lvxattn.reference.wire import PARTIALS, QUERIES, QUERY_BLOCKS, QUERY_GRADIENTS

from .block_attention import block_attention_backward, partial_attention
from .exchange import Exchange
from .merge import Array, merge_partials


def lv_xattn(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`; what is returned is a
    partial result over all keys: out, top and total.
    """
    queries, partials = exchange.rotation(QUERIES), exchange.rotation(PARTIALS, start=1)
    (k1, v1, mask1), (k2, v2, mask2) = exchange.split_home(k_shard, v_shard)
    P, scale = exchange.P, exchange.scale

    # 1. Send my queries on; the first part of my own work hides their way.
    queries.send(q)
    with exchange.computing(hop=0):
        mine = partial_attention(q, k1, v1, scale=scale, mask=mask1)

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        (q_block,) = queries.receive()
        if hop < P - 1:
            queries.forward()
        # 3. Attend from the visiting queries to my keys.
        with exchange.computing(hop):
            part = partial_attention(
                q_block, k_shard, v_shard, scale=scale, mask=exchange.view(hop)
            )
        # 4. Merge with what the ranks before me found, and send it after the block.
        if hop > 1:
            part = merge_partials(*part, *partials.receive())
        partials.send(*part)

    if P > 1:
        # 5. The rest of my own work hides the way home of its result.
        with exchange.computing(hop=0):
            rest = partial_attention(q, k2, v2, scale=scale, mask=mask2)
        mine = merge_partials(*mine, *rest)
        # 6. Merge with what all the others found for my queries.
        mine = merge_partials(*mine, *partials.receive())
    return mine


def lv_xattn_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `lv_xattn`.

    Collective: every rank calls this.  delta (`delta_of`) takes the place of out and dlse; dk and
    dv are those of my keys, summed over all queries.
    """
    blocks, gradients = exchange.rotation(QUERY_BLOCKS), exchange.rotation(QUERY_GRADIENTS, start=1)
    (k1, v1, mask1), (k2, v2, mask2) = exchange.split_home(k_shard, v_shard)
    P, scale = exchange.P, exchange.scale

    # 1. Send my block on; the first part of my own work hides its way.
    blocks.send(q, dout, lse, delta)
    with exchange.computing(hop=0):
        dq, dk, dv = block_attention_backward(
            dout, q, k1, v1, lse, delta, scale=scale, mask=mask1,
            dtype=k_shard.dtype if P == 1 else exchange.wide,  # alone, nothing is added to them
        )  # fmt: skip
    if P > 1:
        dk, dv = lengthen(dk, k_shard), lengthen(dv, v_shard)

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        q_block, dout_block, lse_block, delta_block = blocks.receive()
        if hop < P - 1:
            blocks.forward()
        # 3. Differentiate the visitor's attention to my keys; dk and dv are added to in place.
        with exchange.computing(hop):
            part, dk_part, dv_part = block_attention_backward(
                dout_block, q_block, k_shard, v_shard, lse_block, delta_block,
                scale=scale, mask=exchange.view(hop),
            )  # fmt: skip
        dk += dk_part
        dv += dv_part
        # 4. Add to it what the ranks before me found, and send it after the block.
        if hop > 1:
            part += gradients.receive()[0]
        gradients.send(part)

    if P > 1:
        # 5. The rest of my own work hides the way home of its gradient.
        with exchange.computing(hop=0):
            rest, dk2, dv2 = block_attention_backward(
                dout, q, k2, v2, lse, delta, scale=scale, mask=mask2
            )
        dq += rest
        dk[:, :, exchange.layout.home_cut :] += dk2
        dv[:, :, exchange.layout.home_cut :] += dv2
        # 6. Add what all the others found for my queries.
        dq += gradients.receive()[0]
    return dq, dk, dv


def lengthen(part: Array, whole: Array) -> Array:
    """Return the gradient of the first keys with zeros for all that follow in `whole`."""
    return torch.nn.functional.pad(part, (0, 0, 0, whole.shape[2] - part.shape[2]))
