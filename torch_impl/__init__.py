"""Distributed cross-attention in PyTorch, differentiable: what people train with."""

from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.block_attention import block_attention, block_attention_backward
from lvxattn.torch_impl.cross_attention import cross_attention
from lvxattn.torch_impl.layout import Layout, shard, unshard
from lvxattn.torch_impl.measure import measure
from lvxattn.torch_impl.merge import merge
from lvxattn.torch_impl.module import CrossAttention, sum_gradients
from lvxattn.torch_impl.recompute import cross_attention_layer

__all__ = [
    "CrossAttention",
    "Layout",
    "Meter",
    "block_attention",
    "block_attention_backward",
    "cross_attention",
    "cross_attention_layer",
    "measure",
    "merge",
    "shard",
    "sum_gradients",
    "unshard",
]
