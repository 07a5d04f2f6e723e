"""Distributed cross-attention in PyTorch, differentiable, over a process group."""

from lvxattn.common.meter import Meter
from lvxattn.common.rules import Rule
from lvxattn.common.segments import Causal, Segments

from .block_attention import block_attention, block_attention_backward
from .cross_attention import cross_attention
from .layout import Layout, shard, unshard
from .measure import measure
from .merge import merge
from .module import CrossAttention, sum_gradients
from .recompute import cross_attention_layer

__all__ = [
    "Causal",
    "CrossAttention",
    "Layout",
    "Meter",
    "Rule",
    "Segments",
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
