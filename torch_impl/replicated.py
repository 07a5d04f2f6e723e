r"""Replicated queries: every rank holds all queries, and attends to its own keys.

Where the text model is not sharded, every rank has all queries and needs all of out.  One
all-reduce, whose operator is the merge, joins the ranks' results over disjoint keys.

Backward.  All ranks compute the same loss from the same out, so that every rank has dout.  dk and
dv of a rank's own keys stay there, and dq is summed over the ranks.

Equation: the merge of arXiv:2502.02406, section 3.
"""

from .block_attention import block_attention_backward, partial_attention
from .collectives import added, all_reduce
from .exchange import Exchange
from .merge import Array, merge_partials

# The meter's name of this work; `Block.name` fills in the rank.
WHAT = "all queries, with the keys of rank {}"


def replicated(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from all queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`.  Returns (out, top,
    total), merged over all ranks' keys, on every rank.
    """
    mask = exchange.mask_view_of_all()

    # 1. Attend from all queries to my keys.
    with exchange.computing(what=WHAT):
        partial = partial_attention(q, k_shard, v_shard, scale=exchange.scale, mask=mask)
    # 2. Merge with the results for the other ranks' keys.
    out, top, total = all_reduce(exchange, merge_partials, *partial)
    return out, top, total


def replicated_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `replicated`; dq is complete on every rank.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq,
    and dk and dv of this rank's keys, summed over all queries.
    """
    mask = exchange.mask_view_of_all()

    # 1. Differentiate all queries' attention to my keys.
    with exchange.computing(what=WHAT):
        dq, dk, dv = block_attention_backward(
            dout, q, k_shard, v_shard, lse, delta,
            scale=exchange.scale, mask=mask, dtype=k_shard.dtype,
        )  # fmt: skip
    # 2. Add the gradients through the other ranks' keys.
    (dq,) = all_reduce(exchange, added, dq)
    return dq, dk, dv
