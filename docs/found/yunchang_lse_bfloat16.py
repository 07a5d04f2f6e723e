"""yunchang: ring_flash_attn_func with AttnType.TORCH_FLASH in bfloat16, where lse is large.

torchrun --standalone --nproc-per-node 2 yunchang_lse_bfloat16.py
"""

import torch
import torch.distributed as dist
from yunchang import ring_flash_attn_func
from yunchang.kernels import AttnType
from yunchang.kernels import attention as kernels


def flash(q, k, v, scale, **_):
    """Call PyTorch's flash kernel for CPUs, whose lse is in float32, instead of that for GPUs."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


kernels._scaled_dot_product_flash_attention = flash
dist.init_process_group("gloo")
rank, P = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
q, k, v = (torch.randn(1, 8 * P, 2, 8) for _ in range(3))
q[..., 0], k[..., 0] = 28, 28 * 8**0.5  # adds 784 to every score
q, k, v = (x.bfloat16() for x in (q, k, v))
s = torch.einsum("bihd,bjhd->bihj", q.double(), k.double()) * 8**-0.5
expected = torch.einsum("bihj,bjhd->bihd", torch.softmax(s, -1), v.double()).chunk(P, 1)[rank]
mine = [x.chunk(P, 1)[rank].contiguous() for x in (q, k, v)]
out = ring_flash_attn_func(*mine, group=dist.group.WORLD, attn_type=AttnType.TORCH_FLASH)
error, rounding = (
    float((x.double() - expected).norm() / expected.norm()) for x in (out, expected.bfloat16())
)
print(f"rank {rank} of {P}: relative error {error:.1e}, of rounding out alone {rounding:.1e}")
dist.destroy_process_group()
