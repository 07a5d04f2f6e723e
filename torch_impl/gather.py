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

from torch import Tensor

from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import block_attention_backward, partial_attention
from lvxattn.torch_impl.collectives import added, all_gather, reduce_scatter
from lvxattn.torch_impl.exchange import Exchange
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.merge import merge_partials


def gather(
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    group: Group,
    layout: Layout,
    *,
    mask: Tensor | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from this rank's queries to all ranks' keys.

    Collective: every rank of the group calls this.  Arguments are those of `cross_attention`,
    checked against the layout; the result is a partial one, over all keys: out, top and total.
    Autograd sees nothing of it.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(partial(partial_attention, scale=layout.scale), "all ranks' queries")

    # 1. Give my queries to all ranks, and take theirs.
    (q_all,) = all_gather(exchange, q)
    # 2. What my keys have to say to all queries.
    part = attend(0, q_all, k_shard, v_shard, mask=layout.view(mask, 0, layout.rank))
    # 3. Every result goes home, and is merged there with what the other ranks' keys had to say.
    out, top, total = reduce_scatter(exchange, merge_partials, *part)
    return out, top, total


def gather_backward(
    dout: Tensor,
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    lse: Tensor,
    delta: Tensor,
    group: Group,
    layout: Layout,
    *,
    mask: Tensor | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `gather`.

    Collective: every rank of the group calls this.  Arguments are those of the forward, with delta
    in place of out and dlse (`delta_of`); dk and dv are those of this rank's keys, summed over all
    queries in the accumulator dtype.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale), "all ranks' queries"
    )

    # 1. Give my block to all ranks, and take theirs.
    q_all, dout_all, lse_all, delta_all = all_gather(exchange, q, dout, lse, delta)
    # 2. What my keys have to say to all queries; dk and dv stay here.
    view = layout.view(mask, 0, layout.rank)
    dq, dk, dv = attend(
        0, dout_all, q_all, k_shard, v_shard, lse_all, delta_all, mask=view, dtype=k_shard.dtype
    )
    # 3. Every gradient goes home, and is added there to what the other ranks' keys had to say.
    (dq,) = reduce_scatter(exchange, added, dq)
    return dq, dk, dv
