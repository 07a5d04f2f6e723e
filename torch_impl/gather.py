r"""Gather: every rank gets all queries at once, and sends all results home at once.

The schedule of few messages.  Where there are few queries, as in a decode step, it is latency that
counts, and one large block feeds the hardware better than P small ones.  Rank r, P = 4:

    1  all-gather        q of r to all             all q
    2  attend            all q to the keys of r
    3  reduce-scatter    result q to its owner     results of all ranks for q of r, merged

The reduction's operator is the merge: associative, commutative, with (0, -inf, 0) as identity.
The same bytes travel as with lv-xattn, P - 1 blocks and P - 1 results, but nothing hides them.

Backward.  q, dout, lse and delta are gathered; dq is reduced by plain sums; dk and dv stay.

Source: the reduction is that of arXiv:2408.04093, scattered; pass-Q of arXiv:2411.01783.
"""

from .block_attention import block_attention_backward, partial_attention
from .collectives import added, all_gather, reduce_scatter
from .exchange import Exchange
from .merge import Array, merge_partials

WHAT = "all ranks' queries"


def gather(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`; what is returned is a
    partial result over all keys: out, top and total.
    """
    # 1. Give my queries to all ranks, and take theirs.
    (q_all,) = all_gather(exchange, q)
    # 2. Attend from all queries to my keys.
    with exchange.computing(what=WHAT):
        part = partial_attention(
            q_all, k_shard, v_shard, scale=exchange.scale, mask=exchange.view_of_all()
        )
    # 3. Every result goes home, and is merged there with those of the other ranks' keys.
    out, top, total = reduce_scatter(exchange, merge_partials, *part)
    return out, top, total


def gather_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `gather`.

    Collective: every rank calls this.  delta (`delta_of`) takes the place of out and dlse; dk and
    dv are those of my keys, summed over all queries.
    """
    # 1. Give my block to all ranks, and take theirs.
    q_all, dout_all, lse_all, delta_all = all_gather(exchange, q, dout, lse, delta)
    # 2. Differentiate all queries' attention to my keys; dk and dv stay here.
    with exchange.computing(what=WHAT):
        dq, dk, dv = block_attention_backward(
            dout_all, q_all, k_shard, v_shard, lse_all, delta_all,
            scale=exchange.scale, mask=exchange.view_of_all(), dtype=k_shard.dtype,
        )  # fmt: skip
    # 3. Every gradient goes home, and is added there to those of the other ranks' keys.
    (dq,) = reduce_scatter(exchange, added, dq)
    return dq, dk, dv
