"""ring-attention-pytorch: ring_flash_attn, self- and cross-attention, against a plain softmax.

torchrun --standalone --nproc-per-node 2 ring_attention_pytorch_gradients.py
"""

import torch
import torch.distributed as dist
from ring_attention_pytorch import ring_flash_attn

dist.init_process_group("gloo")
rank, P = dist.get_rank(), dist.get_world_size()


def error(got, expected):
    """Return the relative error of this rank's part."""
    return f"{float(((got - expected).norm() / expected.norm()).detach()):.1e}"


for S_Q, S_KV in ((4 * P, 4 * P), (4 * P, 8 * P)):
    torch.manual_seed(0)
    q, dout = (torch.randn(2, S_Q, 3, 8) for _ in range(2))
    k, v = (torch.randn(2, S_KV, 3, 8) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    s = torch.einsum("bihd,bjhd->bihj", q, k) * 8**-0.5
    whole = torch.einsum("bihj,bjhd->bihd", torch.softmax(s, -1), v)
    dq, dk, dv = (x.chunk(P, 1)[rank] for x in torch.autograd.grad(whole, leaves, dout))
    mine = [x.detach().chunk(P, 1)[rank].clone().requires_grad_() for x in leaves]
    out = ring_flash_attn(*mine, ring_reduce_col=True, ring_size=P)
    found = torch.autograd.grad(out, mine, dout.chunk(P, 1)[rank])
    local = torch.einsum("bihd,bjhd->bihj", mine[0], mine[1]) * 8**-0.5
    local = torch.einsum("bihj,bjhd->bihd", torch.softmax(local, -1), mine[2])
    print(
        f"rank {rank} of {P}, S_Q {S_Q}, S_KV {S_KV}: out {error(out, whole.chunk(P, 1)[rank])}, "
        f"out against attention to this rank's keys only {error(out, local)}, "
        f"dq {error(found[0], dq)}, dk {error(found[1], dk)}, dv {error(found[2], dv)}, "
        f"returned dk against dk + dv {error(found[1], dk + dv)}",
        flush=True,
    )
dist.destroy_process_group()
