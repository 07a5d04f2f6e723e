"""Distributed cross-attention in PyTorch: what people train with."""

from lvxattn.torch_impl.block_attention import block_attention, block_attention_backward
from lvxattn.torch_impl.merge import merge

__all__ = [
    "block_attention",
    "block_attention_backward",
    "merge",
]
