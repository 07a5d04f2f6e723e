r"""Replicated queries: every rank holds all of them, and attends to its own keys only.

Nothing goes round.  Where the text model is not spread over the ranks, each has all queries and is
to have all of out; the ranks' results, over disjoint keys, are joined by one all-reduce whose
operator is the merge.

Backward.  All ranks compute the same loss from the same out, so that every rank has dout; dk and dv
are those of its own keys, and dq is the sum over all ranks' keys.

Equation: the merge of arXiv:2502.02406, section 3.
"""

from .block_attention import block_attention_backward, partial_attention
from .collectives import added, all_reduce
from .exchange import Exchange
from .merge import Array, merge_partials

WHAT = "all queries, with the keys of rank {}"


def replicated(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from all queries to all ranks' keys; the result is on every rank.

    Collective: every rank calls this.  Arguments come from `cross_attention`; what is returned is a
    partial result over all keys: out, top and total.
    """
    # 1. Attend from all queries to my keys.
    with exchange.computing(what=WHAT):
        part = partial_attention(
            q, k_shard, v_shard, scale=exchange.scale, mask=exchange.view_of_all()
        )
    # 2. Merge with the results of the other ranks' keys.
    out, top, total = all_reduce(exchange, merge_partials, *part)
    return out, top, total


def replicated_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `replicated`; dq is whole on every rank.

    Collective: every rank calls this.  delta (`delta_of`) takes the place of out and dlse; dk and
    dv are those of my keys, summed over all queries.
    """
    dk, dv = exchange.accumulators(k_shard, v_shard, once=True)

    # 1. Differentiate all queries' attention to my keys; dk and dv stay here.
    with exchange.computing(what=WHAT):
        dq = block_attention_backward(
            dout, q, k_shard, v_shard, lse, delta, dk, dv,
            scale=exchange.scale, mask=exchange.view_of_all(),
        )  # fmt: skip
    # 2. Add the gradients of the other ranks' keys.
    (dq,) = all_reduce(exchange, added, dq)
    return dq, dk, dv
