r"""Replicated queries: every rank holds all of them, and attends to its own keys only.

Nothing goes round.  Where the text model is not spread over the ranks, each has all queries and is
to have all of out; the ranks' results, over disjoint keys, are joined by one all-reduce whose
operator is the merge.

Backward.  All ranks compute the same loss from the same out, so that every rank has dout; dk and dv
are those of its own keys, and dq is the sum of what each rank's keys have to say.

Equation: the merge of arXiv:2502.02406, section 3.
"""

from functools import partial

from torch import Tensor

from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import block_attention_backward, partial_attention
from lvxattn.torch_impl.collectives import added, all_reduce
from lvxattn.torch_impl.exchange import Exchange
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.merge import merge_partials


def replicated(
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    group: Group,
    layout: Layout,
    *,
    mask: Tensor | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from all queries to all ranks' keys; the result is on every rank.

    Collective: every rank of the group calls this.  Arguments are those of `cross_attention`,
    checked against the layout; the result is a partial one, over all keys: out, top and total.
    Autograd sees nothing of it.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(
        partial(partial_attention, scale=layout.scale), "all queries, with the keys of rank {}"
    )

    # 1. What my keys have to say to all queries.
    part = attend(0, q, k_shard, v_shard, mask=layout.view(mask, layout.rank, layout.rank))
    # 2. Join that with what the others' have to say.
    out, top, total = all_reduce(exchange, merge_partials, *part)
    return out, top, total


def replicated_backward(
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
    """Differentiate `replicated`.

    Collective: every rank of the group calls this.  Arguments are those of the forward, with delta
    in place of out and dlse (`delta_of`); dq is whole on every rank.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale),
        "all queries, with the keys of rank {}",
    )

    # 1. What my keys have to say; dk and dv stay here.
    view = layout.view(mask, layout.rank, layout.rank)
    dq, dk, dv = attend(0, dout, q, k_shard, v_shard, lse, delta, mask=view, dtype=k_shard.dtype)
    # 2. Add that to what the others' have to say.
    (dq,) = all_reduce(exchange, added, dq)
    return dq, dk, dv
