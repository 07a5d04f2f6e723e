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

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.reference.block_attention import block_attention_backward, partial_attention
from lvxattn.reference.collectives import added, all_gather, reduce_scatter
from lvxattn.reference.exchange import Exchange
from lvxattn.reference.layout import Layout
from lvxattn.reference.masks import MaskRule
from lvxattn.reference.merge import merge_partials
from lvxattn.reference.meter import Meter
from lvxattn.reference.virtual_ranks import VirtualComm

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]


def gather(
    q: Array,
    k_shard: Array,
    v_shard: Array,
    comm: VirtualComm,
    layout: Layout,
    *,
    mask: AnyArray | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank of comm calls this.  Arguments are those of `cross_attention`, checked
    against the layout, in fp64; the result is a partial one, over all keys: out, top and total.
    """
    meter = meter or Meter()
    exchange = Exchange(comm, layout, meter)
    attend = exchange.computes(partial(partial_attention, scale=layout.scale), "all ranks' queries")

    # 1. Give my queries to all ranks, and take theirs.
    (q_all,) = all_gather(exchange, q)
    # 2. What my keys have to say to all queries.
    part = attend(0, q_all, k_shard, v_shard, mask=layout.view(mask, 0, layout.rank))
    # 3. Every result goes home, and is merged there with what the other ranks' keys had to say.
    out, top, total = reduce_scatter(exchange, merge_partials, *part)
    return out, top, total


def gather_backward(
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
    """Differentiate `gather`.

    Collective: every rank of comm calls this.  Arguments and results are those of
    `cross_attention_backward`, checked against the layout, in fp64, with delta in place of out and
    dlse (`delta_of`).
    """
    meter = meter or Meter()
    exchange = Exchange(comm, layout, meter)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale), "all ranks' queries"
    )
    dk, dv = np.zeros(k_shard.shape), np.zeros(v_shard.shape)

    # 1. Give my block to all ranks, and take theirs.
    q_all, dout_all, lse_all, delta_all = all_gather(exchange, q, dout, lse, delta)
    # 2. What my keys have to say to all queries; dk and dv stay here.
    view = layout.view(mask, 0, layout.rank)
    dq = attend(0, dout_all, q_all, k_shard, v_shard, lse_all, delta_all, dk, dv, mask=view)
    # 3. Every gradient goes home, and is added there to what the other ranks' keys had to say.
    (dq,) = reduce_scatter(exchange, added, dq)
    return dq, dk, dv
