"""The truth: distributed cross-attention in NumPy and fp64, every rank a thread of one process."""

from lvxattn.reference.block_attention import block_attention, block_attention_backward
from lvxattn.reference.cross_attention import cross_attention, cross_attention_backward
from lvxattn.reference.full_attention import full_attention, full_attention_backward
from lvxattn.reference.layout import Layout, shard, unshard
from lvxattn.reference.merge import merge
from lvxattn.reference.meter import Meter
from lvxattn.reference.recompute import (
    Saved,
    cross_attention_layer,
    cross_attention_layer_backward,
)
from lvxattn.reference.virtual_ranks import Message, VirtualComm, run_ranks

__all__ = [
    "Layout",
    "Message",
    "Meter",
    "Saved",
    "VirtualComm",
    "block_attention",
    "block_attention_backward",
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_layer",
    "cross_attention_layer_backward",
    "full_attention",
    "full_attention_backward",
    "merge",
    "run_ranks",
    "shard",
    "unshard",
]
