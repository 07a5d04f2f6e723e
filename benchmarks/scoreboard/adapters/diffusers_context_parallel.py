"""diffusers' context parallelism on CPUs; arrays are (B, S, H, D) there."""

from functools import cache

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.scoreboard.adapters import cuda_ops_on_cpus
from benchmarks.scoreboard.adapters.limits import (
    needs_all_ranks,
    needs_divisible_heads,
    needs_equal_heads,
    needs_equal_shards,
    needs_equal_sizes,
    needs_filled_shards,
    needs_no_mask,
)

PACKAGE = "diffusers' context parallelism"


def ring(q, k, v, group, *, scale, mask):
    """ring_degree, backend _native_flash."""
    needs_no_mask(mask, "'`attn_mask` is not supported for native flash attention': it")
    needs_equal_shards(q, k, group, f"{PACKAGE} without ring_anything")
    return _attend(q, k, v, group, scale, mask, "_native_flash", "ring")


def ring_with_masks(q, k, v, group, *, scale, mask):
    """ring_degree, backend _native_cudnn, which takes masks."""
    needs_equal_shards(q, k, group, f"{PACKAGE} without ring_anything")
    return _attend(q, k, v, group, scale, mask, "_native_cudnn", "ring")


def ring_anything(q, k, v, group, *, scale, mask):
    """ring_anything, backend _native_flash."""
    needs_no_mask(mask, "'TemplatedRingAnythingAttention does not support non-None attn_mask': it")
    needs_filled_shards(q, k, group, PACKAGE)
    return _attend(q, k, v, group, scale, mask, "_native_flash", "ring", ring_anything=True)


def ulysses(q, k, v, group, *, scale, mask):
    """ulysses_degree, backend native."""
    needs_equal_shards(q, k, group, f"{PACKAGE} without ulysses_anything")
    needs_divisible_heads(q, k, group, f"{PACKAGE} without ulysses_anything")
    return _attend(q, k, v, group, scale, mask, "native", "ulysses")


def ulysses_anything(q, k, v, group, *, scale, mask):
    """ulysses_anything, backend native."""
    needs_filled_shards(q, k, group, PACKAGE)
    try:
        return _attend(q, k, v, group, scale, mask, "native", "ulysses", ulysses_anything=True)
    except AssertionError as error:
        if "Padding head num" in str(error):  # on all ranks
            raise NotImplementedError(str(error)) from None
        raise


def _attend(q, k, v, group, scale, mask, backend, degree, **anything):
    ranks = dist.get_world_size(group)
    if ranks == 1:
        raise NotImplementedError(f"{PACKAGE}: a degree 'must be greater than 1'")
    needs_all_ranks(group, PACKAGE)
    needs_equal_heads(q, k, f"'GQA is not yet supported for templated attention': {PACKAGE}")
    needs_equal_sizes(k, v, f"{PACKAGE} ('model layout (B, S, H, D)')")
    if mask is not None:  # of keys: models pass (B, s_kv), split like the keys
        if callable(mask) or mask.ndim != 4 or mask.shape[1] * mask.shape[2] != 1:
            raise NotImplementedError(f"{PACKAGE}: a mask is one of keys, split like these")
        mask = mask.expand(q.shape[0], 1, 1, k.shape[2]).contiguous()
    cuda_ops_on_cpus.register()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    config = _config(degree, ranks, **anything)
    out = dispatch_attention_fn(
        q, k, v, attn_mask=mask, scale=scale, backend=backend, parallel_config=config
    )
    return out.transpose(1, 2)


@cache
def _config(degree, ranks, **anything):
    """Return the configuration that enable_parallelism would set up, on CPUs.  Collective."""
    context = ContextParallelConfig(**{f"{degree}_degree": ranks}, **anything)
    config = ParallelConfig(context_parallel_config=context)
    mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    config.setup(dist.get_rank(), ranks, torch.device("cpu"), mesh=mesh)
    return config
