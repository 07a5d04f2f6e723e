r"""LV-XAttn: keys and values stay, the short query blocks go round the ring.

Forward.  A rank attends from every visiting block to its own keys; what has been computed for a
block follows it one hop behind, is merged on the way and ends at home.  Rank r, P = 4:

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

from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl.block_attention import block_attention_backward, partial_attention
from lvxattn.mpi_impl.device import array_module
from lvxattn.mpi_impl.exchange import BLOCKS, RESULTS, Exchange, Field
from lvxattn.mpi_impl.merge import merge_partials
from lvxattn.reference.layout import Layout
from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter

Array = Any  # NumPy or CuPy


def lv_xattn(
    q: Array,
    k_shard: Array,
    v_shard: Array,
    comm: MPI.Intracomm,
    layout: Layout,
    *,
    mask: Array | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Array, Array, Array]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank of comm calls this.  Arguments are those of `cross_attention`, checked
    against the layout; the result is a partial one, over all keys: out, top and total.
    """
    meter = meter or Meter()
    xp, wide = array_module(q), np.dtype(layout.accumulator)
    exchange = Exchange(comm, layout, meter, xp)

    def block(owner: int) -> list[Field]:
        return [((layout.B, layout.H, layout.s_q[owner], layout.D), q.dtype)]

    def result(owner: int) -> list[Field]:
        rows = layout.B, layout.H, layout.s_q[owner]
        return [((*rows, layout.D_V), wide), (rows, wide), (rows, wide)]

    queries, results = exchange.rotation(BLOCKS, block), exchange.rotation(RESULTS, result, hop=1)
    attend = exchange.computes(
        partial(partial_attention, scale=layout.scale, progress=exchange.progress)
    )
    P, home = layout.size, layout.view(mask, layout.rank, layout.rank)
    cut = layout.home_cut

    # 1. Send my queries on; the first part of my own block's work hides their way.
    if P > 1:
        queries.shift(q)
    mine = attend(0, q, k_shard[:, :, :cut], v_shard[:, :, :cut], mask=home)

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        (q_block,) = queries.wait()
        if hop < P - 1:
            queries.shift()
        # 3. What my keys have to say to it.
        view = layout.view(mask, layout.owner(hop), layout.rank)
        part = attend(hop, q_block, k_shard, v_shard, mask=view)
        # 4. Merge that with what the ranks before me have said, and send it after the block.
        if hop > 1:
            part = merge_partials(*part, *results.wait())
        results.shift(*part)

    if P > 1:
        # 5. The rest of my own block's work hides the way home of its result.
        rest = attend(0, q, k_shard[:, :, cut:], v_shard[:, :, cut:], mask=home.from_key(cut))
        mine = merge_partials(*mine, *rest)
        # 6. What all the others have said to my queries.
        mine = merge_partials(*mine, *results.wait())
    exchange.finish()
    return mine


def lv_xattn_backward(
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
    """Differentiate `lv_xattn`.

    Collective: every rank of comm calls this.  Arguments and results are those of
    `cross_attention_backward`, checked against the layout, with delta in place of out and dlse
    (`delta_of`); sums are in the accumulator dtype.
    """
    meter = meter or Meter()
    xp, wide = array_module(q), np.dtype(layout.accumulator)
    exchange = Exchange(comm, layout, meter, xp)

    def block(owner: int) -> list[Field]:
        rows = layout.B, layout.H, layout.s_q[owner]
        tall: list[Field] = [((*rows, layout.D), q.dtype), ((*rows, layout.D_V), q.dtype)]
        return [*tall, (rows, wide), (rows, wide)]

    def result(owner: int) -> list[Field]:
        return [((layout.B, layout.H, layout.s_q[owner], layout.D), wide)]

    blocks, results = exchange.rotation(BLOCKS, block), exchange.rotation(RESULTS, result, hop=1)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale, progress=exchange.progress)
    )
    P, home = layout.size, layout.view(mask, layout.rank, layout.rank)
    cut = layout.home_cut
    sums = k_shard.dtype if P == 1 else wide  # alone, nothing else is added to dk and dv
    dk, dv = xp.zeros(k_shard.shape, sums), xp.zeros(v_shard.shape, sums)
    first, last = np.s_[:, :, :cut], np.s_[:, :, cut:]

    # 1. Send my block on; the first part of my own block's work hides its way.
    if P > 1:
        blocks.shift(q, dout, lse, delta)
    dq = attend(
        0, dout, q, k_shard[first], v_shard[first], lse, delta, dk[first], dv[first], mask=home
    )

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        q_block, dout_block, lse_block, delta_block = blocks.wait()
        if hop < P - 1:
            blocks.shift()
        # 3. What my keys have to say to it; dk and dv stay here and are added to in place.
        view = layout.view(mask, layout.owner(hop), layout.rank)
        part = attend(
            hop, dout_block, q_block, k_shard, v_shard, lse_block, delta_block, dk, dv, mask=view
        )
        # 4. Add that to what the ranks before me have said, and send it after the block.
        if hop > 1:
            part += results.wait()[0]
        results.shift(part)

    if P > 1:
        # 5. The rest of my own block's work hides the way home of its gradient.
        dq += attend(
            0, dout, q, k_shard[last], v_shard[last], lse, delta, dk[last], dv[last],
            mask=home.from_key(cut),
        )  # fmt: skip
        # 6. What all the others have said to my queries.
        dq += results.wait()[0]
    exchange.finish()
    return dq, dk, dv
