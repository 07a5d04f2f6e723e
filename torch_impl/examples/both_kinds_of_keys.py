r"""Text that attends to its own keys, on every rank, and to a video's, which are sharded.

    torchrun --standalone --nproc-per-node 4 -m lvxattn.torch_impl.examples.both_kinds_of_keys

Under one softmax, as in layers where self-attention and cross-attention are one:

    keys          text                     video
    held by       every rank, all of it    the ranks, a part each
    a query sees  itself, and before       all
    is sent       dk, dv: summed once      q and results: round the ring

Attention over either set gives (out, lse); `merge` joins them, and is differentiable.  Every rank
compares its part with one softmax over the concatenated keys, in one process.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvxattn.torch_impl import Causal, cross_attention, merge, shard

TEXT, VIDEO = 45, 1030  # tokens


def attend(q: Tensor, k_text: Tensor, v_text: Tensor, k_video: Tensor, v_video: Tensor) -> Tensor:
    """Attend from this rank's text to all text before and to all ranks' video.

    Collective: every rank of the program calls this, and its backward.
    """
    text = cross_attention(
        q, k_text, v_text, keys="replicated", mask=Causal(), return_lse=True
    )  # (B, H, s_q, D) and (B, H, s_q)
    video = cross_attention(q, k_video, v_video, return_lse=True)
    out, _ = merge(*text, *video)
    return out


def main() -> None:
    """Compare results and gradients.  Collective: every rank of the program calls this."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    # The whole sequences: (B, H, S, D), float64.
    whole = [
        torch.randn(1, heads, length, 16, dtype=torch.float64)
        for heads, length in ((8, TEXT), (2, TEXT), (2, TEXT), (2, VIDEO), (2, VIDEO))
    ]
    q, k_text, v_text, k_video, v_video = whole
    mine = [shard(q), k_text, v_text, shard(k_video), shard(v_video)]
    mine = [x.clone().requires_grad_() for x in mine]
    out = attend(*mine)
    dq, dk_text, dv_text, dk_video, dv_video = torch.autograd.grad(out.square().sum(), mine)

    # One softmax over all keys, in one process.
    alone = [x.clone().requires_grad_() for x in whole]
    k, v = (torch.cat([alone[i], alone[i + 2]], dim=2) for i in (1, 2))
    seen = torch.ones(TEXT, TEXT + VIDEO, dtype=torch.bool)
    seen[:, :TEXT].tril_()
    want = scaled_dot_product_attention(alone[0], k, v, attn_mask=seen, enable_gqa=True)
    grads = torch.autograd.grad(want.square().sum(), alone)
    pairs = [
        (out, shard(want)), (dq, shard(grads[0])),
        (dk_text, grads[1]), (dv_text, grads[2]),  # complete on every rank
        (dk_video, shard(grads[3])), (dv_video, shard(grads[4])),
    ]  # fmt: skip
    worst = torch.stack([(a - b).abs().max() for a, b in pairs]).max().detach()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        sys.stdout.write(
            f"{TEXT} queries on {dist.get_world_size()} ranks, "
            f"{TEXT} keys on every rank and {VIDEO} sharded\n"
            f"largest difference from one process: {worst:.1e}\n"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
