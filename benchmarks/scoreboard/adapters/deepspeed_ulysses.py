"""DeepSpeed Ulysses over PyTorch's SDPA; arrays are (B, S, H, D) there."""

import deepspeed
from deepspeed.sequence.layer import DistributedAttention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.scoreboard.adapters.limits import (
    needs_divisible_heads,
    needs_equal_shards,
    needs_no_mask,
)

# Its all-reduce in shared memory, for inference, would be compiled by init_distributed, where a
# lock that a killed compilation left stops every rank for good.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ulysses(q, k, v, group, *, scale, mask):
    """DistributedAttention with SDPA as its local attention."""
    needs_no_mask(mask, "DistributedAttention (its local attention sees the whole sequence)")
    needs_equal_shards(q, k, group, "DistributedAttention")
    needs_divisible_heads(q, k, group, "DistributedAttention, as tried here")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

    def local(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2)

    layer = DistributedAttention(local, group, scatter_idx=2, gather_idx=1)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return layer(q, k, v, 0).transpose(1, 2)
