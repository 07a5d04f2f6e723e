"""PyTorch's context parallelism."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options
from torch.nn import functional

from benchmarks.scoreboard.adapters.limits import needs_equal_shards, needs_no_mask


def sdpa(q, k, v, group, *, scale, mask):
    """scaled_dot_product_attention, which context_parallel replaces."""
    needs_no_mask(mask, "scaled_dot_product_attention under context_parallel")
    needs_equal_shards(q, k, group, "context_parallel")
    mesh = DeviceMesh.from_group(group, "cpu")
    _cp_options.enable_load_balance = False  # of causal masks: it reorders the sequence
    some = torch.zeros(mesh.size())
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    with context_parallel(mesh, buffers=[some], buffer_seq_dims=[0]):
        q, k, v = (x.contiguous() for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, scale=scale, **gqa)
