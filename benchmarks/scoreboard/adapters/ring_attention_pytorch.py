"""ring-attention-pytorch; arrays are (B, S, H, D) there."""

import torch
import torch.distributed as dist
from ring_attention_pytorch import ring_flash_attn

from benchmarks.scoreboard.adapters.limits import (
    needs_array_mask,
    needs_default_scale,
    needs_equal_shards,
    needs_equal_sizes,
    needs_self_attention,
)

PACKAGE = "ring_flash_attn"


def ring(q, k, v, group, *, scale, mask):
    """ring_flash_attn on the ring of all ranks, as many queries as keys."""
    needs_equal_shards(q, k, group, PACKAGE)
    needs_self_attention(q, k, f"{PACKAGE} (another entry has cross-attention)")
    return cross(q, k, v, group, scale=scale, mask=mask)


def cross(q, k, v, group, *, scale, mask):
    """ring_flash_attn, whatever the numbers of queries and keys."""
    ranks = dist.get_world_size(group)
    if ranks != dist.get_world_size():
        raise NotImplementedError(f"{PACKAGE} takes no group")
    needs_default_scale(q, scale, PACKAGE)
    needs_equal_sizes(k, v, f"{PACKAGE} ('assert k.shape[-2:] == v.shape[-2:]')")
    needs_array_mask(mask)
    if mask is not None:  # of keys: (B, s_kv)
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] * mask.shape[2] != 1:
            raise NotImplementedError(f"{PACKAGE}: a mask is a bool array of keys, 'b j'")
        mask = mask[:, 0, 0].expand(q.shape[0], k.shape[2]).contiguous()
    needs_equal_shards(q, k, group, PACKAGE)
    # Query head g * H_KV + h reads key-value head h there.
    B, H, s_q, D = q.shape
    H_KV = k.shape[1]
    q = q.reshape(B, H_KV, H // H_KV, s_q, D).transpose(1, 2).reshape(q.shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = ring_flash_attn(q, k, v, mask, ring_reduce_col=True, ring_size=ranks).transpose(1, 2)
    return out.reshape(B, H // H_KV, H_KV, s_q, D).transpose(1, 2).reshape(out.shape)
