r"""Replicated queries, or replicated keys: one side is whole on every rank.

Queries.  Where the text model is not sharded, every rank has all queries and needs all of out.  It
attends to its own keys, and one all-reduce, whose operator is the merge, joins the ranks' results
over disjoint keys.  In the backward all ranks compute the same loss from the same out, so that
every rank has dout.  dk and dv of a rank's own keys stay there, and dq is summed over the ranks.

Keys.  Where there are few keys and very many queries, as where the latents of a video attend to a
prompt, every rank has all keys, and some of the queries.  Nothing is sent in the forward.  In the
backward dq stays, and dk and dv are summed over the ranks, once.

Equation: the merge of arXiv:2502.02406, section 3.
"""

from .block_attention import block_attention_backward, partial_attention
from .collectives import added, all_reduce
from .exchange import Exchange
from .merge import Array, merge_partials

# The meter's names of this work; `Block.name` fills in the rank.
ALL_QUERIES = "all queries, with the keys of rank {}"
ALL_KEYS = "the queries of rank {}, with all keys"


def replicated_queries(
    q: Array, k_shard: Array, v_shard: Array, exchange: Exchange
) -> tuple[Array, Array, Array]:
    """Attend from all queries to all ranks' keys.

    Collective: every rank calls this.  Arguments come from `cross_attention`.  Returns (out, top,
    total), merged over all ranks' keys, on every rank.
    """
    mask = exchange.mask_view_of_all()

    # 1. Attend from all queries to my keys.
    with exchange.computing(what=ALL_QUERIES):
        partial = partial_attention(q, k_shard, v_shard, scale=exchange.scale, mask=mask)
    # 2. Merge with the results for the other ranks' keys.
    out, top, total = all_reduce(exchange, merge_partials, *partial)
    return out, top, total


def replicated_queries_backward(
    dout: Array, q: Array, k_shard: Array, v_shard: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `replicated_queries`; dq is complete on every rank.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq,
    and dk and dv of this rank's keys, summed over all queries.
    """
    dk, dv = exchange.accumulators(k_shard, v_shard)
    mask = exchange.mask_view_of_all()

    # 1. Differentiate all queries' attention to my keys.
    with exchange.computing(what=ALL_QUERIES):
        dq = block_attention_backward(
            dout, q, k_shard, v_shard, lse, delta, dk, dv,
            scale=exchange.scale, mask=mask, wanted=exchange.wanted,
        )  # fmt: skip
    # 2. Add the gradients through the other ranks' keys.
    if "q" in exchange.wanted:
        (dq,) = all_reduce(exchange, added, dq)
    return dq, dk, dv


def replicated_keys(q: Array, k: Array, v: Array, exchange: Exchange) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all keys, which it has.

    Arguments come from `cross_attention`.  Returns (out, top, total).
    """
    mask = exchange.mask_view(hop=0)

    # 1. Attend from my queries to all keys.
    with exchange.computing(what=ALL_KEYS):
        return partial_attention(q, k, v, scale=exchange.scale, mask=mask)


def replicated_keys_backward(
    dout: Array, q: Array, k: Array, v: Array, lse: Array, delta: Array,
    exchange: Exchange,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Differentiate `replicated_keys`; dk and dv are complete on every rank.

    Collective: every rank calls this.  delta (from `delta_of`) replaces out and dlse.  Returns dq
    of this rank's queries, and dk and dv of all keys, summed over all queries.
    """
    dk, dv = exchange.accumulators(k, v)
    mask = exchange.mask_view(hop=0)

    # 1. Differentiate my queries' attention to all keys.
    with exchange.computing(what=ALL_KEYS):
        dq = block_attention_backward(
            dout, q, k, v, lse, delta, dk, dv,
            scale=exchange.scale, mask=mask, wanted=exchange.wanted,
        )  # fmt: skip
    # 2. Add the gradients through the other ranks' queries.
    if "k" in exchange.wanted:
        dk, dv = all_reduce(exchange, added, dk, dv)
    return dq, dk, dv
