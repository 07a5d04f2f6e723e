"""diffusers: TemplatedRingAttention's backward, against autograd of a plain softmax.

torchrun --standalone --nproc-per-node 3 diffusers_ring_backward.py [--reversed]
"""

import sys

import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch as peer
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from torch.distributed.device_mesh import init_device_mesh


def forward(ctx, q, k, v, *_, _save_ctx=True, **_others):
    """Stand in for a GPU's kernel, which returns lse: plain softmax, in (B, S, H, D)."""
    s = torch.einsum("bihd,bjhd->bihj", q, k) * q.shape[3] ** -0.5
    lse = s.logsumexp(-1)
    out = torch.einsum("bihj,bjhd->bihd", torch.exp(s - lse[..., None]), v)
    if _save_ctx:
        ctx.save_for_backward(q, k, v, out, lse)
    return out, lse


def backward(ctx, dout, query=None, key=None, value=None, out=None, lse=None):
    """Return the gradients through these keys, given out and lse of all keys."""
    saved = ctx.saved_tensors  # what versions up to 0.39 expect
    q, k, v, out, lse = (
        s if x is None else x for x, s in zip((query, key, value, out, lse), saved, strict=True)
    )
    scale = q.shape[3] ** -0.5
    p = torch.exp(torch.einsum("bihd,bjhd->bihj", q, k) * scale - lse[..., None])
    dp = torch.einsum("bihd,bjhd->bihj", dout, v)
    ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * scale
    return (
        torch.einsum("bihj,bjhd->bihd", ds, k),
        torch.einsum("bihj,bihd->bjhd", ds, q),
        torch.einsum("bihj,bihd->bjhd", p, dout),
    )


def error(got, expected):
    """Return the relative error, of all ranks together."""
    parts = torch.stack([(got - expected).norm() ** 2, expected.norm() ** 2])
    dist.all_reduce(parts)
    return float((parts[0] / parts[1]).sqrt())


dist.init_process_group("gloo")
rank, P = dist.get_rank(), dist.get_world_size()
context = ContextParallelConfig(ring_degree=P, convert_to_fp32=False)
config = ParallelConfig(context_parallel_config=context)
mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
config.setup(rank, P, torch.device("cpu"), mesh=mesh)
if "--reversed" in sys.argv:  # the gradients travel with the keys: to rank - 1
    permute = peer.funcol.permute_tensor
    before = [(r - 1) % P for r in range(P)]
    peer.funcol.permute_tensor = lambda x, _, group: permute(x, before, group=group)

torch.manual_seed(0)
whole = [torch.randn(2, 4 * P, 3, 8, dtype=torch.float64) for _ in range(4)]
q, k, v = (x.requires_grad_() for x in whole[:3])
p = torch.softmax(torch.einsum("bihd,bjhd->bihj", q, k) * 8**-0.5, -1)
expected = torch.einsum("bihj,bjhd->bihd", p, v)
wanted = torch.autograd.grad(expected, (q, k, v), whole[3])

mine = [x.detach().chunk(P, 1)[rank].clone().requires_grad_() for x in (q, k, v)]
out = peer.TemplatedRingAttention.apply(
    *mine, None, 0.0, False, None, False, False, forward, backward, config
)
found = torch.autograd.grad(out, mine, whole[3].chunk(P, 1)[rank])
lines = [f"P = {P}: out {error(out, expected.chunk(P, 1)[rank]):.1e}"]
for name, got, right in zip(("dq", "dk", "dv"), found, wanted, strict=True):
    lines.append(f"{name} {error(got, right.chunk(P, 1)[rank]):.1e}")
if rank == 0:
    print(", ".join(lines))
dist.destroy_process_group()
