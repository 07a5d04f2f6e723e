r"""Ring Attention: queries stay, the long blocks of keys and values go round the ring.

The baseline that LV-XAttn is measured against, with the same tiles, merging and overlap.  Forward.
A rank attends from its own queries to every visiting block of keys; nothing follows, for the
results are already at home.  Rank r, P = 4:

    hop        0 (home)      1           2           3           home again (backward)
    k, v       of r          of r-1      of r-2      of r-3      of r, 2nd part
    sends      k, v of r     of r-1      of r-2      -           -
    and (backward)           dk dv r-1   dk dv r-2   dk dv r-3   -

Backward.  k and v go round again; dk and dv follow one hop behind, are added to on the way and end
at home, after P - 1 hops like everything else.  dq is summed where the queries are.

An array mask belongs to the keys and travels with them; a callable stays, and is asked about the
keys of every rank.

Source: arXiv:2310.01889, algorithm 1.
"""

from functools import partial

import torch
from torch import Tensor

from lvxattn.reference.masks import MaskRule
from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import block_attention_backward, partial_attention
from lvxattn.torch_impl.exchange import BLOCKS, RESULTS, Exchange, Field
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.lv_xattn import lengthen
from lvxattn.torch_impl.merge import merge_partials


def ring_attention(
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
    blocks = exchange.rotation(BLOCKS, partial(block_fields, layout, q.dtype))
    attend = exchange.computes(partial(partial_attention, scale=layout.scale))
    P, rank = layout.size, layout.rank
    home, cut = layout.view(mask, rank, rank), layout.home_cut

    # 1. Send my keys and values on; my own block's work hides their way.
    if P > 1:
        blocks.shift(k_shard, v_shard, *travelling(mask))
    mine = attend(0, q, k_shard[:, :, :cut], v_shard[:, :, :cut], mask=home)
    if P > 1:
        # Cut as the backward cuts it: scores are then rounded in the same way.
        rest = attend(0, q, k_shard[:, :, cut:], v_shard[:, :, cut:], mask=home.from_key(cut))
        mine = merge_partials(*mine, *rest)

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        k_block, v_block, *mask_block = blocks.wait()
        if hop < P - 1:
            blocks.shift()
        # 3. What its keys have to say to my queries.
        view = layout.view(visiting(mask, mask_block), rank, layout.owner(hop))
        part = attend(hop, q, k_block, v_block, mask=view)
        # 4. Merge that with what the blocks before have said.
        mine = merge_partials(*mine, *part)
    exchange.finish()
    return mine


def ring_attention_backward(
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
    """Differentiate `ring_attention`.

    Collective: every rank of the group calls this.  Arguments are those of the forward, with delta
    in place of out and dlse (`delta_of`); dk and dv are those of this rank's keys, summed over all
    queries in the accumulator dtype.
    """
    meter = meter or Meter()
    wide = getattr(torch, layout.accumulator)
    exchange = Exchange(group, layout, meter, q.device)

    def result(owner: int) -> list[Field]:
        keys = layout.B, layout.H_KV, layout.s_kv[owner]
        return [((*keys, layout.D), wide), ((*keys, layout.D_V), wide)]

    blocks = exchange.rotation(BLOCKS, partial(block_fields, layout, q.dtype))
    results = exchange.rotation(RESULTS, result, hop=1)
    attend = exchange.computes(partial(block_attention_backward, scale=layout.scale))
    P, rank = layout.size, layout.rank
    home, cut = layout.view(mask, rank, rank), layout.home_cut

    # 1. Send my keys and values on; the first part of my own block's work hides their way.
    if P > 1:
        blocks.shift(k_shard, v_shard, *travelling(mask))
    dq, dk, dv = attend(
        0, dout, q, k_shard[:, :, :cut], v_shard[:, :, :cut], lse, delta, mask=home,
        dtype=k_shard.dtype if P == 1 else wide,  # alone, nothing is added to dk and dv
    )  # fmt: skip
    if P > 1:
        dk, dv = lengthen(dk, k_shard), lengthen(dv, v_shard)

    for hop in range(1, P):
        # 2. Take over a visiting block, and send it on before working on it.
        k_block, v_block, *mask_block = blocks.wait()
        if hop < P - 1:
            blocks.shift()
        # 3. What its keys have to say to my queries, and they to its keys; dq stays here.
        view = layout.view(visiting(mask, mask_block), rank, layout.owner(hop))
        part, dk_block, dv_block = attend(hop, dout, q, k_block, v_block, lse, delta, mask=view)
        dq += part
        # 4. Add that to what the ranks before me have said, and send it after the block.
        if hop > 1:
            dk_before, dv_before = results.wait()
            dk_block += dk_before
            dv_block += dv_before
        results.shift(dk_block, dv_block)

    if P > 1:
        # 5. The rest of my own block's work hides the way home of its gradients.
        rest, dk_part, dv_part = attend(
            0, dout, q, k_shard[:, :, cut:], v_shard[:, :, cut:], lse, delta,
            mask=home.from_key(cut),
        )  # fmt: skip
        dq += rest
        dk[:, :, cut:] += dk_part
        dv[:, :, cut:] += dv_part
        # 6. What all the others have said to my keys.
        dk_others, dv_others = results.wait()
        dk += dk_others
        dv += dv_others
    exchange.finish()
    return dq, dk, dv


def block_fields(layout: Layout, dtype: torch.dtype, owner: int) -> list[Field]:
    """Return the shapes and dtypes of what travels: keys, values and a tensor mask over them."""
    keys = layout.B, layout.H_KV, layout.s_kv[owner]
    fields: list[Field] = [((*keys, layout.D), dtype), ((*keys, layout.D_V), dtype)]
    mask = layout.masks[owner]
    return fields if mask is None else [*fields, (mask[0], getattr(torch, mask[1]))]


def travelling(mask: Tensor | MaskRule | None) -> list[Tensor]:
    """Return what of a mask travels with its keys: a tensor, nothing else."""
    return [] if mask is None or not isinstance(mask, Tensor) else [mask]


def visiting(mask: Tensor | MaskRule | None, mask_block: list[Tensor]) -> Tensor | MaskRule | None:
    """Return the mask of a visiting block: what came with it, or this rank's rule."""
    if mask_block:
        return mask_block[0]
    return None if isinstance(mask, Tensor) else mask
