"""diffusers: ulysses_anything with a mask of keys, where shards differ in length.

torchrun --standalone --nproc-per-node 3 diffusers_ulysses_anything_mask.py

Where ranks wait for messages that do not come, as with diffusers 0.39, it ends after 20 seconds.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.distributed.device_mesh import init_device_mesh

dist.init_process_group("gloo", timeout=timedelta(seconds=20))
rank, P = dist.get_rank(), dist.get_world_size()
context = ContextParallelConfig(ulysses_degree=P, ulysses_anything=True)
config = ParallelConfig(context_parallel_config=context)
mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
config.setup(rank, P, torch.device("cpu"), mesh=mesh)

for first in (0, 1):  # as torch.tensor_split cuts them: one more on the first rank
    for masked in (False, True):
        torch.manual_seed(0)
        q = torch.randn(2, 4 * P, P, 8)
        k, v = (torch.randn(2, 6 * P + first, P, 8) for _ in range(2))
        mask = torch.rand(2, 6 * P + first) < (0.5 if masked else 1)
        mask[:, 0] = True
        s = torch.einsum("bihd,bjhd->bihj", q, k) * 8**-0.5
        p = torch.softmax(s.masked_fill(~mask[:, None, None], -torch.inf), -1)
        expected = torch.einsum("bihj,bjhd->bihd", p, v).chunk(P, 1)[rank]
        lengths = [6 + first, *[6] * (P - 1)]
        mine = [q.chunk(P, 1)[rank], *(x.split(lengths, 1)[rank] for x in (k, v))]
        given = mask.split(lengths, 1)[rank][:, None, None].contiguous()
        kind = "masked" if masked else "unmasked"
        line = f"rank {rank}, keys {lengths}, {kind}: "
        try:
            out = dispatch_attention_fn(
                *mine, attn_mask=given if masked else None, backend="native", parallel_config=config
            )
            line += f"relative error {float((out - expected).norm() / expected.norm()):.1e}"
        except RuntimeError as error:
            print(f"{line}RuntimeError: {str(error).splitlines()[0]}", flush=True)
            sys.exit(1)  # the other ranks may be anywhere
        print(line, flush=True)
dist.destroy_process_group()
