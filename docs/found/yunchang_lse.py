"""yunchang: ring_flash_attn_func with AttnType.TORCH_MATH, against a plain softmax.

torchrun --standalone --nproc-per-node 2 yunchang_lse.py
"""

import torch
import torch.distributed as dist
from yunchang import ring_flash_attn_func
from yunchang.kernels import AttnType

dist.init_process_group("gloo")
rank, P = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4 * P, 3, 8) for _ in range(3))
s = torch.einsum("bihd,bjhd->bihj", q, k) * 8**-0.5
expected = torch.einsum("bihj,bjhd->bihd", torch.softmax(s, -1), v).chunk(P, 1)[rank]
mine = [x.chunk(P, 1)[rank].contiguous() for x in (q, k, v)]
out = ring_flash_attn_func(*mine, group=dist.group.WORLD, attn_type=AttnType.TORCH_MATH)

# What the merge gives if every part has the same weight.
parts = [
    torch.einsum(
        "bihj,bjhd->bihd",
        torch.softmax(torch.einsum("bihd,bjhd->bihj", mine[0], k_part) * 8**-0.5, -1),
        v_part,
    )
    for k_part, v_part in zip(k.chunk(P, 1), v.chunk(P, 1), strict=True)
]
mean = sum(parts) / P
print(
    f"rank {rank} of {P}: relative error {float((out - expected).norm() / expected.norm()):.1e}, "
    f"against the mean of the parts {float((out - mean).norm() / mean.norm()):.1e}"
)
dist.destroy_process_group()
