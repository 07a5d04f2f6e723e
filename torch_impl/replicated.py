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
from lvxattn.torch_impl.block_attention import block_attention, block_attention_backward, delta_of
from lvxattn.torch_impl.collectives import added, all_reduce
from lvxattn.torch_impl.exchange import Exchange
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.merge import merge


def replicated(
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    group: Group,
    layout: Layout,
    *,
    mask: Tensor | MaskRule | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from all queries to all ranks' keys; the result is on every rank.

    Collective: every rank of the group calls this.  Arguments and results are those of
    `cross_attention`, already checked against the layout; autograd sees nothing of it.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(
        partial(block_attention, scale=layout.scale), "all queries, with the keys of rank {}"
    )

    # 1. What my keys have to say to all queries.
    out, lse = attend(0, q, k_shard, v_shard, mask=layout.view(mask, layout.rank, layout.rank))
    # 2. Join that with what the others' have to say.
    out, lse = all_reduce(exchange, merge, out, lse)
    return out.to(q.dtype), lse


def replicated_backward(
    dout: Tensor,
    q: Tensor,
    k_shard: Tensor,
    v_shard: Tensor,
    out: Tensor,
    lse: Tensor,
    group: Group,
    layout: Layout,
    *,
    mask: Tensor | MaskRule | None = None,
    dlse: Tensor | None = None,
    meter: Meter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `replicated`.

    Collective: every rank of the group calls this.  Arguments and results are those of the
    forward and their gradients; dq is whole on every rank.
    """
    meter = meter or Meter()
    exchange = Exchange(group, layout, meter, q.device)
    attend = exchange.computes(
        partial(block_attention_backward, scale=layout.scale),
        "all queries, with the keys of rank {}",
    )
    dout = dout.to(q.dtype)  # as it is on the ranks that it visits
    dout, delta = delta_of(dout, out, lse, dlse)

    # 1. What my keys have to say; dk and dv stay here.
    view = layout.view(mask, layout.rank, layout.rank)
    dq, dk, dv = attend(0, dout, q, k_shard, v_shard, lse, delta, mask=view, dtype=k_shard.dtype)
    # 2. Add that to what the others' have to say.
    (dq,) = all_reduce(exchange, added, dq)
    return dq.to(q.dtype), dk, dv
