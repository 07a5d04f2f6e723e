"""PyTorch's context parallelism.

It has rings of three operators for CUDA (flash, efficient, cuDNN), and none of that which
scaled_dot_product_attention calls on CPUs; so the flash operator is called by its name.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._attention import (
    _cp_options,
    _enable_context_parallel_dispatcher,
    set_rotate_method,
)

from benchmarks.scoreboard.adapters import cuda_ops_on_cpus
from benchmarks.scoreboard.adapters.limits import (
    needs_all_ranks,
    needs_equal_shards,
    needs_no_mask,
)


def allgather(q, k, v, group, *, scale, mask):
    """Rotate method allgather, the default: keys are gathered once."""
    return _attend("allgather", q, k, v, group, scale, mask)


def alltoall(q, k, v, group, *, scale, mask):
    """Rotate method alltoall: keys go round."""
    return _attend("alltoall", q, k, v, group, scale, mask)


def _attend(method, q, k, v, group, scale, mask):
    needs_no_mask(mask, "context_parallel ('attn_bias is not supported yet')")
    needs_all_ranks(group, "context_parallel")
    needs_equal_shards(q, k, group, "context_parallel")
    _enable()
    set_rotate_method(method)
    mesh = _mesh(dist.get_world_size())
    # SDPA gives this operator nothing with another last stride than 1.
    q, k, v = (
        DTensor.from_local(x.contiguous(), mesh, [Shard(2)], run_check=False) for x in (q, k, v)
    )
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0].to_local()


@cache
def _enable():
    """Do what context_parallel does on entry, for good: a backward belongs inside it, too."""
    cuda_ops_on_cpus.register()
    _cp_options.enable_load_balance = False  # "requires `is_causal=True`"
    _enable_context_parallel_dispatcher()


@cache
def _mesh(ranks):
    return init_device_mesh("cpu", (ranks,))
