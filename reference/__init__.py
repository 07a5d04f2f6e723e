"""Reference implementation in NumPy, float64: every rank is a thread of one process.

To be read in the order of `merge`, `block_attention`, `exchange`, `lv_xattn`, `cross_attention`.
`full_attention` is the ground truth: one process, no merge.
"""

from lvxattn.common.layout import shard, unshard
from lvxattn.common.meter import Meter
from lvxattn.common.rules import Rule
from lvxattn.common.segments import Causal, Segments
from lvxattn.plan.choose import Layout

from .block_attention import block_attention, block_attention_backward
from .cross_attention import cross_attention, cross_attention_backward
from .full_attention import full_attention, full_attention_backward
from .merge import merge
from .recompute import Saved, cross_attention_layer, cross_attention_layer_backward
from .virtual_ranks import Message, VirtualComm, run_ranks

__all__ = [
    "Causal",
    "Layout",
    "Message",
    "Meter",
    "Rule",
    "Saved",
    "Segments",
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
