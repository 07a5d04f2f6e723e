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

import numpy as np
import numpy.typing as npt

from lvxattn.reference.block_attention import block_attention_backward, partial_attention
from lvxattn.reference.collectives import added, all_reduce
from lvxattn.reference.exchange import Exchange
from lvxattn.reference.layout import Layout
from lvxattn.reference.masks import MaskRule
from lvxattn.reference.merge import merge_partials
from lvxattn.reference.meter import Meter
from lvxattn.reference.virtual_ranks import VirtualComm

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]


def replicated(
    q: Array,
    k_shard: Array,
    v_shard: Array,
    comm: VirtualComm,
    layout: Layout,
    *,
    mask: AnyArray | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Attend from all queries to all ranks' keys; the result is on every rank.

    Collective: every rank of comm calls this.  Arguments are those of `cross_attention`, checked
    against the layout, in fp64; the result is a partial one, over all keys: out, top and total.
    """
    meter = meter or Meter()
    exchange = Exchange(comm, layout, meter)
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
    comm: VirtualComm,
    layout: Layout,
    *,
    mask: AnyArray | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Differentiate `replicated`.

    Collective: every rank of comm calls this.  Arguments and results are those of
    `cross_attention_backward`, checked against the layout, in fp64, with delta in place of out and
    dlse (`delta_of`); dq is whole on every rank.
    """
    meter = meter or Meter()
    exchange = Exchange(comm, layout, meter)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale),
        "all queries, with the keys of rank {}",
    )
    dk, dv = np.zeros(k_shard.shape), np.zeros(v_shard.shape)

    # 1. What my keys have to say; dk and dv stay here.
    view = layout.view(mask, layout.rank, layout.rank)
    dq = attend(0, dout, q, k_shard, v_shard, lse, delta, dk, dv, mask=view)
    # 2. Add that to what the others' have to say.
    (dq,) = all_reduce(exchange, added, dq)
    return dq, dk, dv
