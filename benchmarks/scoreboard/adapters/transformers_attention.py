"""The attention functions of transformers, by the names that models choose them by."""

from types import SimpleNamespace

import torch
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from benchmarks.scoreboard.adapters.limits import needs_array_mask


def eager(q, k, v, *, scale, mask):
    """Llama's eager_attention_forward, whose mask is additive."""
    if mask is not None and not callable(mask) and mask.dtype == torch.bool:
        raise NotImplementedError("eager_attention_forward adds its mask")
    return _attend(eager_attention_forward, q, k, v, scale, mask)


def sdpa(q, k, v, *, scale, mask):
    """sdpa_attention_forward."""
    return _attend(AttentionInterface()["sdpa"], q, k, v, scale, mask)


def flex(q, k, v, *, scale, mask):
    """flex_attention_forward, whose mask is additive and one for all heads."""
    if q.dtype == torch.float64:
        raise NotImplementedError("no float64 'in FlexAttention for CPU device'")
    if mask is not None and not callable(mask):
        if mask.dtype == torch.bool:
            raise NotImplementedError("flex_attention_forward adds its mask")
        mask = mask.expand(q.shape[0], -1, q.shape[2], k.shape[2])
    return _attend(AttentionInterface()["flex_attention"], q, k, v, scale, mask)


def _attend(forward, q, k, v, scale, mask):
    needs_array_mask(mask)
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1):
        raise NotImplementedError("masks of models are (B, 1, S_Q, S_KV)")
    module = SimpleNamespace(
        num_key_value_groups=q.shape[1] // k.shape[1], is_causal=False, training=False
    )
    out, _ = forward(module, q, k, v, mask, scaling=scale, dropout=0.0)
    return out.transpose(1, 2)
