"""torch.nn.functional.scaled_dot_product_attention, by backend."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.scoreboard.adapters.limits import needs_array_mask


def math(q, k, v, *, scale, mask):
    """Attend with the backend MATH."""
    return _attend(SDPBackend.MATH, q, k, v, scale, mask)


def flash(q, k, v, *, scale, mask):
    """Attend with the backend FLASH_ATTENTION, or not at all."""
    return _attend(SDPBackend.FLASH_ATTENTION, q, k, v, scale, mask)


def default(q, k, v, *, scale, mask):
    """Attend with the backend that PyTorch chooses."""
    needs_array_mask(mask)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attend(backend, q, k, v, scale, mask):
    with sdpa_kernel(backend):
        try:
            return default(q, k, v, scale=scale, mask=mask)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise NotImplementedError(f"{backend.name}: {error}") from None
            raise


def multihead(q, k, v, *, scale, mask):
    """torch.nn.MultiheadAttention whose projections are the identity."""
    needs_array_mask(mask)
    (B, H, S_Q, D), S_KV = q.shape, k.shape[2]
    if k.shape[1] != H:
        raise NotImplementedError("nn.MultiheadAttention has one number of heads")
    if v.shape[3] != D:
        raise NotImplementedError("nn.MultiheadAttention projects values to the head size of keys")
    if scale != D**-0.5:
        raise NotImplementedError("nn.MultiheadAttention has no scale")
    layer = torch.nn.MultiheadAttention(H * D, H, bias=False, batch_first=True, dtype=q.dtype)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(H * D, dtype=q.dtype).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(H * D, dtype=q.dtype))
    layer.requires_grad_(False)
    if mask is not None:
        mask = mask.expand(B, H, S_Q, S_KV).reshape(B * H, S_Q, S_KV)
        mask = ~mask if mask.dtype == torch.bool else mask  # there, True hides
    flat = [x.transpose(1, 2).reshape(B, -1, H * D) for x in (q, k, v)]
    out, _ = layer(*flat, attn_mask=mask, need_weights=False)
    return out.reshape(B, S_Q, H, D).transpose(1, 2)
