r"""Gather: every rank receives all queries at once, and all results return at once.

The schedule with the fewest messages.  With few queries, as in a decode step, latency dominates,
and one large block uses the hardware better than P small ones.  Rank r, P = 4:

    step                 sends                     receives
    1  all-gather        q of r to all             all q
    2  attend            all q to the keys of r
    3  reduce-scatter    result q to its owner     results of all ranks for q of r, merged

The operator of the reduction is the merge: associative, commutative, with (0, -inf, 0) as identity.
As many bytes travel as with lv-xattn, P - 1 blocks and P - 1 results, but nothing overlaps with
their transfer.

Backward.  q, dout, lse and delta are gathered; dq is reduced by plain sums; dk and dv stay.

Source: the reduction is that of arXiv:2408.04093, scattered; pass-Q of arXiv:2411.01783.
"""

from .block_attention import block_attention_backward, partial_attention
from .collectives import added, all_gather, reduce_scatter
from .exchange import Exchange
from .merge import Array, merge_partials

# The meter's name of this work.
WHAT = "all ranks' queries"


def gather(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`.  Returns (out, top,
    total), merged over all ranks' keys.
    """
    mask = exchange.mask_view_of_all()

    # 1. Gather all ranks' queries.
    (q_all,) = all_gather(exchange, q)
    # 2. Attend from all queries to my keys.
    with exchange.computing(what=WHAT):
        partial = partial_attention(
            q_all, k_shard, v_shard, scale=exchange.scale, mask=mask, progress=exchange.progress
        )
    # 3. Return every result to its owner, merged over all ranks' keys.
    out, top, total = reduce_scatter(exchange, merge_partials, *partial)
    return out, top, total


def gather_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `gather`.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq,
    and dk and dv of this rank's keys, summed over all queries.
    """
    dk, dv = exchange.accumulators(k_shard, v_shard)
    mask = exchange.mask_view_of_all()

    # 1. Gather all ranks' blocks.
    q_all, dout_all, lse_all, delta_all = all_gather(exchange, q, dout, lse, delta)
    # 2. Differentiate all queries' attention to my keys.
    with exchange.computing(what=WHAT):
        dq = block_attention_backward(
            dout_all, q_all, k_shard, v_shard, lse_all, delta_all, dk, dv,
            scale=exchange.scale, mask=mask, wanted=exchange.wanted, progress=exchange.progress,
        )  # fmt: skip
    # 3. Return every gradient to its owner, summed over all ranks' keys.
    if "q" in exchange.wanted:
        (dq,) = reduce_scatter(exchange, added, dq)
    return dq, dk, dv
