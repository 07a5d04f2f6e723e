r"""Replicated queries: every rank holds all of them, and attends to its own keys only.

Nothing goes round.  Where the text model is not spread over the ranks, each has all queries and is
to have all of out; the ranks' results, over disjoint keys, are joined by one all-reduce whose
operator is the merge.

Backward.  All ranks compute the same loss from the same out, so that every rank has dout; dk and dv
are those of its own keys, and dq is the sum of what each rank's keys have to say.

Equation: the merge of arXiv:2502.02406, section 3.
"""

from functools import partial
from typing import Any

from mpi4py import MPI

from lvxattn.mpi_impl.block_attention import block_attention_backward, partial_attention
from lvxattn.mpi_impl.collectives import added, all_reduce
from lvxattn.mpi_impl.device import array_module
from lvxattn.mpi_impl.exchange import Exchange
from lvxattn.mpi_impl.merge import merge_partials
from lvxattn.reference.layout import Layout
from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter

Array = Any  # NumPy or CuPy


def replicated(
    q: Array,
    k_shard: Array,
    v_shard: Array,
    comm: MPI.Intracomm,
    layout: Layout,
    *,
    mask: Array | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Attend from all queries to all ranks' keys; the result is on every rank.

    Collective: every rank of comm calls this.  Arguments are those of `cross_attention`, checked
    against the layout; the result is a partial one, over all keys: out, top and total.
    """
    meter = meter or Meter()
    exchange = Exchange(comm, layout, meter, array_module(q))
    attend = exchange.computes(
        partial(partial_attention, scale=layout.scale), "all queries, with the keys of rank {}"
    )

    # 1. What my keys have to say to all queries.
    part = attend(0, q, k_shard, v_shard, mask=layout.view(mask, layout.rank, layout.rank))
    # 2. Join that with what the others' have to say.
    out, top, total = all_reduce(exchange, merge_partials, *part)
    return out, top, total


def replicated_backward(
    dout: Array,
    q: Array,
    k_shard: Array,
    v_shard: Array,
    lse: Array,
    delta: Array,
    comm: MPI.Intracomm,
    layout: Layout,
    *,
    mask: Array | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Differentiate `replicated`.

    Collective: every rank of comm calls this.  Arguments and results are those of
    `cross_attention_backward`, checked against the layout, with delta in place of out and dlse
    (`delta_of`); sums are in the accumulator dtype; dq is whole on every rank.
    """
    meter = meter or Meter()
    xp = array_module(q)
    exchange = Exchange(comm, layout, meter, xp)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale),
        "all queries, with the keys of rank {}",
    )
    dk, dv = (xp.zeros(x.shape, x.dtype) for x in (k_shard, v_shard))  # added to once

    # 1. What my keys have to say; dk and dv stay here.
    view = layout.view(mask, layout.rank, layout.rank)
    dq = attend(0, dout, q, k_shard, v_shard, lse, delta, dk, dv, mask=view)
    # 2. Add that to what the others' have to say.
    (dq,) = all_reduce(exchange, added, dq)
    return dq, dk, dv
