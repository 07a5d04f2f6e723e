r"""Documents packed one after the other: every text sees its own image only.

    torchrun --standalone --nproc-per-node 4 -m lvxattn.torch_impl.examples.packed_documents

Texts and images of all documents are each one long sequence, cut evenly over the ranks:

    queries   text 0 | text 1 | text 2 ...         rank 0's | rank 1's | ...
    keys      image 0     | image 1  | ...         rank 0's    | rank 1's    | ...

With `Segments` as the mask, attention between a text and another's image is not computed, and of a
block of queries those rows travel that see keys on other ranks, to those ranks.  Rank 0 prints the
bytes sent with it, and with the same mask as a function that does not know its structure; every
rank compares its part with attention document by document, in one process.
"""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvxattn.torch_impl import Layout, Meter, Segments, cross_attention, shard

TEXTS = [12, 19, 4, 7, 15, 13, 6, 13]
IMAGES = [173, 220, 109, 267, 150, 295, 133, 210]


def main() -> None:
    """Compare results and bytes.  Collective: every rank of the program calls this."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    # The whole sequences, which a program would not have: (B, H, S, D), float64.
    q, k, v = (torch.randn(1, 4, sum(n), 16, dtype=torch.float64) for n in (TEXTS, IMAGES, IMAGES))
    rule = Segments(TEXTS, IMAGES)  # or Segments.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k)

    masks: dict[str, Callable[..., Tensor]] = {"function": rule.__call__, "rule": rule}
    sent = {}
    for name, mask in masks.items():
        parts = [shard(x).clone().requires_grad_() for x in (q, k, v)]
        meter = Meter()
        layout = Layout.agree(*parts, mask=mask)  # once; then for every step with these lengths
        out = cross_attention(*parts, mask=mask, layout=layout, meter=meter)
        results = [out, *torch.autograd.grad(out.square().sum(), parts)]
        sent[name] = torch.tensor([meter.bytes])
        dist.all_reduce(sent[name])

    # Document by document, in one process.
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    texts, images, values = (
        x.split(n, dim=2) for x, n in zip(leaves, (TEXTS, IMAGES, IMAGES), strict=True)
    )
    alone = torch.cat([*map(scaled_dot_product_attention, texts, images, values)], dim=2)
    alone_results = [alone, *torch.autograd.grad(alone.square().sum(), leaves)]
    pairs = zip(results, alone_results, strict=True)
    worst = torch.stack([(a - shard(b)).abs().max() for a, b in pairs]).max().detach()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        without, with_rule = (int(n) for n in sent.values())
        sys.stdout.write(
            f"{len(TEXTS)} documents on {dist.get_world_size()} ranks\n"
            f"bytes sent, forward and backward: {with_rule:,} of {without:,}\n"
            f"largest difference from one process: {worst:.1e}\n"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
