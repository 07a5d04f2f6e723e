"""diffusers: Ulysses' backward where there are more keys than queries.

torchrun --standalone --nproc-per-node 2 diffusers_ulysses_backward.py
"""

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.distributed.device_mesh import init_device_mesh

dist.init_process_group("gloo")
rank, P = dist.get_rank(), dist.get_world_size()
context = ContextParallelConfig(ulysses_degree=P)
config = ParallelConfig(context_parallel_config=context)
mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
config.setup(rank, P, torch.device("cpu"), mesh=mesh)

for S_KV in (4 * P, 8 * P):
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 4 * P, 2 * P, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, S_KV, 2 * P, 8, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    p = torch.softmax(torch.einsum("bihd,bjhd->bihj", q, k) * 8**-0.5, -1)
    whole = torch.einsum("bihj,bjhd->bihd", p, v)
    wanted = torch.autograd.grad(whole, leaves, dout)
    mine = [x.detach().chunk(P, 1)[rank].clone().requires_grad_() for x in leaves]
    out = dispatch_attention_fn(*mine, backend="native", parallel_config=config)
    difference = float((out - whole.chunk(P, 1)[rank]).detach().abs().max())
    line = f"rank {rank} of {P}, S_Q {4 * P}, S_KV {S_KV}: out {difference:.0e}, "
    try:
        found = torch.autograd.grad(out, mine, dout.chunk(P, 1)[rank])
        pairs = zip(found, wanted, strict=True)
        line += (
            f"gradients {max(float((g - w.chunk(P, 1)[rank]).abs().max()) for g, w in pairs):.0e}"
        )
    except RuntimeError as error:
        line += f"backward: RuntimeError: {str(error).splitlines()[0]}"
    print(line, flush=True)
dist.destroy_process_group()
