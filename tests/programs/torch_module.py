"""`CrossAttention` and `sum_gradients` on the ranks of a process group; rank 0 prints JSON.

``gradients``: by recomputation and parameter, how far the sum of all ranks' gradients is from one
process's, relative to the largest.  ``sums``: by property, what each rank has to say to it.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl import CrossAttention, shard, sum_gradients
from lvxattn.torch_impl.examples.two_dimensional_mesh import PlainAttention
from tests.programs.start import finish, start

B, S_Q, S_KV, E, H, H_KV = 2, 7, 23, 16, 4, 2


def gradients(comm: Any, again: bool) -> dict[str, float]:
    """Return how far each parameter's and input's gradient is from what one process finds."""
    torch.manual_seed(0)
    wide = {"dtype": torch.float64}
    model = CrossAttention(E, H, num_kv_heads=H_KV, recompute_kv=again, **wide, group=comm.group)
    alone = PlainAttention(E, H, num_kv_heads=H_KV).to(torch.float64)
    alone.load_state_dict(model.state_dict())
    x, features, wanted = (torch.randn(B, s, E, **wide) for s in (S_Q, S_KV, S_Q))

    whole = x.clone().requires_grad_(), features.clone().requires_grad_()
    nn.functional.mse_loss(alone(*whole), wanted).backward()
    mine = [shard(t, comm, axis=1).clone().requires_grad_() for t in (x, features)]
    out = model(*mine)
    share = (
        nn.functional.mse_loss(out, shard(wanted, comm, axis=1), reduction="sum") / wanted.numel()
    )
    share.backward()
    sum_gradients(model, comm)

    pairs = {
        name: (p.grad, q.grad)
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True)
    }
    pairs |= {
        name: (part.grad, shard(t.grad, comm, axis=1))
        for name, part, t in zip(("x", "features"), mine, whole, strict=True)
    }
    model.group = None  # it must not outlive the group
    return {
        f"{name}, recompute_kv={again}": float((a - b).abs().max() / b.abs().max())
        for name, (a, b) in pairs.items()
    }


class Mixed(nn.Module):
    """Parameters of all kinds; the gradient of each is the rank's number plus 1, if it has one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.fp32 = nn.Parameter(torch.zeros(2, 3))
        self.fp64 = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.bf16 = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.on_rank_1 = nn.Parameter(torch.zeros(2, 2))
        self.nowhere = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        # A view of a larger tensor, as DistributedDataParallel's buckets make gradients.
        self.bucket = torch.full((3, 2), rank + 1.0)
        self.fp32.grad = self.bucket.T
        self.fp64.grad = torch.full((3,), rank + 1 + 2.0**-40, dtype=torch.float64)
        self.bf16.grad = torch.full((5,), rank + 1.0, dtype=torch.bfloat16)
        if rank == 1:
            self.on_rank_1.grad = torch.full((2, 2), 5.0)
        else:  # what another rank has frozen counts for this one's number of parameters, too
            self.on_rank_1.requires_grad_(False)


def sums(comm: Any) -> dict[str, bool]:
    """Return which properties of `sum_gradients` hold on this rank."""
    model = Mixed(comm.rank)
    sum_gradients(model, comm.group)
    total = comm.size * (comm.size + 1) / 2

    def all_are(grad: Tensor | None, value: float, dtype: torch.dtype) -> bool:
        return grad is not None and grad.dtype == dtype and bool((grad == value).all())

    return {
        "float32": all_are(model.fp32.grad, total, torch.float32),
        "in place": bool((model.bucket == total).all()),
        "float64 as such": all_are(model.fp64.grad, total + comm.size * 2.0**-40, torch.float64),
        "bfloat16": all_are(model.bf16.grad, total, torch.bfloat16),
        "one rank's": all_are(model.on_rank_1.grad, 5.0, torch.float32),
        "no rank's": model.nowhere.grad is None,
        "frozen": model.frozen.grad is None,
    }


comm, _ = start()
off: dict[str, float] = {}
for again in (True, False):
    parts = comm.allgather(gradients(comm, again))
    off |= {name: max(part[name] for part in parts) for name in parts[0]}
said = comm.allgather(sums(comm))
if comm.rank == 0:
    by_name = {name: [part[name] for part in said] for name in said[0]}
    json.dump({"gradients": off, "sums": by_name}, sys.stdout)
finish(comm)
