"""Distributed cross-attention over MPI: one rank a process, NumPy or CuPy arrays."""

from lvxattn.mpi_impl.block_attention import block_attention, block_attention_backward
from lvxattn.mpi_impl.cross_attention import cross_attention, cross_attention_backward
from lvxattn.mpi_impl.device import limit_blas_threads, use_device
from lvxattn.mpi_impl.last_words import announce_death
from lvxattn.mpi_impl.measure import measure
from lvxattn.mpi_impl.merge import merge
from lvxattn.mpi_impl.recompute import (
    Saved,
    cross_attention_layer,
    cross_attention_layer_backward,
)
from lvxattn.reference.layout import Layout, shard, unshard
from lvxattn.reference.meter import Meter

__all__ = [
    "Layout",
    "Meter",
    "Saved",
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
