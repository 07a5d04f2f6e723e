"""Distributed cross-attention over MPI: one rank per process, NumPy or CuPy arrays."""

from .transport.start import start as _start

_start(limited="doctor")  # before the imports that start MPI

from lvxattn.common.layout import shard, unshard
from lvxattn.common.meter import Meter
from lvxattn.common.rules import Rule
from lvxattn.common.segments import Causal, Segments
from lvxattn.plan.choose import Layout

from .block_attention import block_attention, block_attention_backward
from .cross_attention import cross_attention, cross_attention_backward
from .measure import measure
from .merge import merge
from .recompute import (
    Saved,
    cross_attention_layer,
    cross_attention_layer_backward,
)
from .transport.death_notice import announce_death
from .transport.device import limit_blas_threads, use_device

__all__ = [
    "Causal",
    "Layout",
    "Meter",
    "Rule",
    "Saved",
    "Segments",
    "announce_death",
    "block_attention",
    "block_attention_backward",
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_layer",
    "cross_attention_layer_backward",
    "limit_blas_threads",
    "measure",
    "merge",
    "shard",
    "unshard",
    "use_device",
]
