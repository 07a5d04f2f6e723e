r"""Replicated queries: every rank holds all of them, and attends to its own keys only.

Nothing goes round.  The ranks' results, over disjoint keys, are joined by the merge in its
many-sided form, which is two all-reduces, the first of them small:

    top = max_r lse_r         w_r = exp(lse_r - top)
    lse = top + log sum_r w_r                     out = sum_r w_r out_r / sum_r w_r

Backward.  All ranks compute the same loss from the same out, so that every rank has dout; dk and dv
are those of its own keys, and dq is the sum of what each rank's keys have to say.

Equation: the merge of arXiv:2502.02406, section 3, over P results at once.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import block_attention, block_attention_backward, delta_of
from lvxattn.torch_impl.exchange import span
from lvxattn.torch_impl.group import Group, over_cpu
from lvxattn.torch_impl.layout import Layout


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
    attend = meter.computes(partial(block_attention, scale=layout.scale))

    # 1. What my keys have to say to all queries.
    with span(f"replicated: compute with the keys of rank {layout.rank}", q.device):
        out, lse = attend(q, k_shard, v_shard, mask=layout.view(mask, layout.rank, layout.rank))
    # 2. Join that with what the others' have to say.
    if layout.size > 1:
        top = all_reduce(lse.clone(), dist.ReduceOp.MAX, group, meter)
        # Where no rank sees a key, lse - top would be NaN; against 0 all weights are 0.
        base = torch.where(top == -torch.inf, 0.0, top)
        weight = torch.exp(lse - base)[..., None]
        joined = torch.cat((weight * out, weight), dim=-1)
        joined = all_reduce(joined, dist.ReduceOp.SUM, group, meter)
        total = joined[..., -1]
        lse = base + torch.log(total)
        out = joined[..., :-1] / torch.where(total == 0, 1.0, total)[..., None]
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
    attend = meter.computes(partial(block_attention_backward, scale=layout.scale))
    dout = dout.to(q.dtype)
    dout, delta = delta_of(dout, out, lse, dlse)

    # 1. What my keys have to say; dk and dv stay here.
    view = layout.view(mask, layout.rank, layout.rank)
    with span(f"replicated: compute with the keys of rank {layout.rank}", q.device):
        dq, dk, dv = attend(dout, q, k_shard, v_shard, lse, delta, mask=view)
    # 2. Add that to what the others' have to say.
    if layout.size > 1:
        dq = all_reduce(dq, dist.ReduceOp.SUM, group, meter)
    return dq.to(q.dtype), dk.to(k_shard.dtype), dv.to(v_shard.dtype)


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: Group, meter: Meter) -> Tensor:
    """Reduce x over the ranks, in place where it can be; return the result, equal on all."""
    sent = x.contiguous()
    if x.device.type != "cpu" and over_cpu(group, x.device):
        sent = sent.cpu()
    meter.sent(sent.nbytes)
    with group.waiting(lambda: "all ranks' results to be joined"), span("all-reduce", x.device):
        meter.waits(dist.all_reduce)(sent, op, group.group)
    return sent.to(x.device)
