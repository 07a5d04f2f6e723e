"""yunchang (long-context-attention) on CPUs; arrays are (B, S, H, D) there."""

from torch.nn.functional import scaled_dot_product_attention
from yunchang import UlyssesAttention, ring_flash_attn_func
from yunchang.kernels import AttnType

from benchmarks.scoreboard.adapters import cuda_ops_on_cpus
from benchmarks.scoreboard.adapters.limits import (
    needs_divisible_heads,
    needs_equal_heads,
    needs_equal_shards,
    needs_equal_sizes,
    needs_no_mask,
)


def ring_flash(q, k, v, group, *, scale, mask):
    """ring_flash_attn_func, TORCH_FLASH, which calls the operator for CUDA by its name."""
    cuda_ops_on_cpus.register()
    return _ring(AttnType.TORCH_FLASH, q, k, v, group, scale, mask)


def ring_math(q, k, v, group, *, scale, mask):
    """ring_flash_attn_func, TORCH_MATH: the one kernel of PyTorch that it has for CPUs."""
    return _ring(AttnType.TORCH_MATH, q, k, v, group, scale, mask)


def ring_efficient(q, k, v, group, *, scale, mask):
    """ring_flash_attn_func, TORCH_EFFICIENT: what its README names where there is no flash_attn."""
    return _ring(AttnType.TORCH_EFFICIENT, q, k, v, group, scale, mask)


def _ring(kind, q, k, v, group, scale, mask):
    needs_no_mask(mask, "ring_flash_attn_func")
    needs_equal_heads(q, k, "yunchang's attention in PyTorch ('bs, seqlen, nhead, hs')")
    needs_equal_sizes(k, v, "yunchang's attention in PyTorch ('bs, seqlen, nhead, hs')")
    needs_equal_shards(q, k, group, "yunchang")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = ring_flash_attn_func(q, k, v, softmax_scale=scale, group=group, attn_type=kind)
    return out.transpose(1, 2)


def ulysses(q, k, v, group, *, scale, mask):
    """UlyssesAttention with PyTorch's SDPA as its attn_fn: none of its own has a backward here."""
    needs_no_mask(mask, "UlyssesAttention")
    needs_divisible_heads(q, k, group, "UlyssesAttention")
    needs_equal_shards(q, k, group, "yunchang ('a local shard for the global Q, K, V')")
    layer = UlyssesAttention(group, attn_type=AttnType.TORCH_MATH)
    layer.attn_fn = _local
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return layer(q, k, v, softmax_scale=scale).transpose(1, 2)


def _local(q, k, v, *, softmax_scale, **_others):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=gqa)
    return out.transpose(1, 2)
