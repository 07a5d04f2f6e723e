"""torch.nn.attention.flex_attention."""

from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def eager(q, k, v, *, scale, mask):
    """flex_attention, not compiled."""
    return _attend(flex_attention, q, k, v, scale, mask)


def compiled(q, k, v, *, scale, mask):
    """flex_attention under torch.compile, with dynamic shapes: each takes most of a minute."""
    return _attend(_compiled(), q, k, v, scale, mask)


@cache
def _compiled():
    # After eight compilations it would go on without one.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=True)


def _attend(attention, q, k, v, scale, mask):
    block_mask = score_mod = None
    shape = (*q.shape[:3], k.shape[2])
    if mask is not None:
        mask_mod = mask
        if not callable(mask):
            whole = mask.expand(shape)

            def mask_mod(b, h, q_index, kv_index):
                return whole[b, h, q_index, kv_index]

            if mask.dtype != torch.bool:

                def score_mod(score, b, h, q_index, kv_index):
                    return score + whole[b, h, q_index, kv_index]

        if score_mod is None:
            block_mask = create_block_mask(mask_mod, *shape, device="cpu")
    gqa = q.shape[1] != k.shape[1]
    return attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=gqa
    )
