"""diffusers: TemplatedRingAttention with a mask of keys, split like the keys.

torchrun --standalone --nproc-per-node 2 diffusers_ring_mask.py
"""

import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch as peer
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from torch.distributed.device_mesh import init_device_mesh


def forward(ctx, q, k, v, mask, *_, _save_ctx=True, **_others):  # noqa: ARG001
    """Stand in for a GPU's kernel, which returns lse: plain softmax, in (B, S, H, D)."""
    s = torch.einsum("bihd,bjhd->bihj", q, k) * q.shape[3] ** -0.5
    s = s.masked_fill(~mask[:, None, None], -torch.inf)
    lse = s.logsumexp(-1)
    return torch.einsum("bihj,bjhd->bihd", torch.exp(s - lse[..., None]), v), lse


dist.init_process_group("gloo")
rank, P = dist.get_rank(), dist.get_world_size()
context = ContextParallelConfig(ring_degree=P, convert_to_fp32=False)
config = ParallelConfig(context_parallel_config=context)
mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
config.setup(rank, P, torch.device("cpu"), mesh=mesh)

torch.manual_seed(0)
q, k, v = (torch.randn(2, 4 * P, 3, 8, dtype=torch.float64) for _ in range(3))
mask = torch.rand(2, 4 * P) < 0.6
mask[:, ::4] = True  # every rank has some visible key
s = torch.einsum("bihd,bjhd->bihj", q, k) * 8**-0.5
p = torch.softmax(s.masked_fill(~mask[:, None, None], -torch.inf), -1)
expected = torch.einsum("bihj,bjhd->bihd", p, v).chunk(P, 1)[rank]

mine = [x.chunk(P, 1)[rank] for x in (q, k, v, mask)]
out = peer.TemplatedRingAttention.apply(
    *mine, 0.0, False, None, False, False, forward, None, config
)
print(f"rank {rank} of {P}: relative error {float((out - expected).norm() / expected.norm()):.1e}")
dist.destroy_process_group()
