"""`CrossAttention` and `sum_gradients` on the ranks of a process group; rank 0 prints JSON.

``gradients``: by schedule, recomputation and parameter, how far the sum of all ranks' gradients is
from one process's, relative to the largest; and how many bytes too many, or too few, a rank sends.
``sums``: by property, what each rank has to say to it.
"""

import json
import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.common.handshake import SCHEDULES
from lvxattn.plan import messages
from lvxattn.torch_impl import CrossAttention, Layout, Meter, shard, sum_gradients
from lvxattn.torch_impl.examples.two_dimensional_mesh import PlainAttention
from tests.programs.start import finish, start

B, S_Q, S_KV, E, H, H_KV = 2, 7, 23, 24, 12, 6  # 2 ranks and 3 divide the heads


def gradients(comm: Any, again: bool, schedule: str) -> dict[str, float]:
    """Return how far each parameter's and input's gradient is from what one process finds.

    With schedule ``"replicated"`` all ranks take the same loss of the same text.
    """
    torch.manual_seed(0)
    wide = {"dtype": torch.float64}
    model = CrossAttention(E, H, num_kv_heads=H_KV, recompute_kv=again, **wide, group=comm.group)
    alone = PlainAttention(E, H, num_kv_heads=H_KV).to(torch.float64)
    alone.load_state_dict(model.state_dict())
    x, features, wanted = (torch.randn(B, s, E, **wide) for s in (S_Q, S_KV, S_Q))

    whole = x.clone().requires_grad_(), features.clone().requires_grad_()
    nn.functional.mse_loss(alone(*whole), wanted).backward()
    replicated = schedule == "replicated"

    def of_text(t: Tensor) -> Tensor:
        return t if replicated else shard(t, comm, axis=1)

    parts, meter = (of_text(x), shard(features, comm, axis=1)), Meter()
    mine = [part.clone().requires_grad_() for part in parts]
    option = {"queries" if replicated else "schedule": schedule}
    out = model(*mine, meter=meter, **option)
    share = nn.functional.mse_loss(out, of_text(wanted), reduction="sum") / wanted.numel()
    share.backward()
    for partial in (model.k_proj, model.v_proj) if replicated else (model,):
        sum_gradients(partial, comm)

    pairs = {
        name: (p.grad, q.grad)
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True)
    }
    pairs["x"] = mine[0].grad, of_text(whole[0].grad)
    pairs["features"] = mine[1].grad, shard(whole[1].grad, comm, axis=1)
    model.group = None  # it must not outlive the group
    q, k = (t.new_empty(B, h, t.shape[1], E // H) for t, h in zip(parts, (H, H_KV), strict=True))
    layout = Layout.agree(q, k, k, comm, **option)
    planned = [m for b in (False, True) for m in messages(layout, comm.rank, backward=b)]
    off_by = meter.bytes - sum(m.nbytes for m in planned)
    return {f"bytes, recompute_kv={again}, {schedule}": abs(off_by)} | {
        f"{name}, recompute_kv={again}, {schedule}": float((a - b).abs().max() / b.abs().max())
        for name, (a, b) in pairs.items()
    }


class Mixed(nn.Module):
    """Parameters of all kinds; the gradient of each is the rank's number plus 1, if it has one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.fp32 = nn.Parameter(torch.zeros(2, 3))
        self.fp64 = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.bf16 = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.complex64 = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
        self.complex128 = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
        self.sparse = nn.Embedding(5, 2, sparse=True)  # its rows 0 and, by rank, another
        self.sparse_on_rank_1 = nn.Embedding(5, 2, sparse=True)
        self.dense_on_rank_1 = nn.Embedding(5, 2, sparse=True)
        self.on_rank_1 = nn.Parameter(torch.zeros(2, 2))
        self.nowhere = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        # A view of a larger tensor, as DistributedDataParallel's buckets make gradients.
        self.bucket = torch.full((3, 2), rank + 1.0)
        self.fp32.grad = self.bucket.T
        self.fp64.grad = torch.full((3,), rank + 1 + 2.0**-40, dtype=torch.float64)
        self.bf16.grad = torch.full((5,), rank + 1.0, dtype=torch.bfloat16)
        self.complex64.grad = torch.full((2, 2), (rank + 1) * (1 + 2j))
        double = torch.full((3,), rank + 1 + 2.0**-40 * 1j, dtype=torch.complex128)
        self.complex128.grad = double.conj()
        self.sparse(torch.tensor([0, 1 + rank])).sum().backward()
        if rank == 1:
            self.sparse_on_rank_1(torch.tensor([3])).sum().backward()
            self.dense_on_rank_1.weight.grad = torch.ones(5, 2)
        else:
            self.dense_on_rank_1(torch.tensor([3])).sum().backward()
        if rank == 1:
            self.on_rank_1.grad = torch.full((2, 2), 5.0)
        else:  # what another rank has frozen counts for this one's number of parameters, too
            self.on_rank_1.requires_grad_(False)


def sums(comm: Any) -> dict[str, bool]:
    """Return which properties of `sum_gradients` hold on this rank."""
    model = Mixed(comm.rank)
    sum_gradients(model, comm.group)
    total = comm.size * (comm.size + 1) / 2

    def all_are(grad: Tensor | None, value: complex, dtype: torch.dtype) -> bool:
        return grad is not None and grad.dtype == dtype and bool((grad == value).all())

    def rows(embedding: nn.Embedding, *, sparse: bool = True) -> list[float]:
        grad = embedding.weight.grad
        if grad is None or grad.is_sparse is not sparse:
            return []
        grad = grad.to_dense()
        return grad[:, 0].tolist() if grad[:, 0].equal(grad[:, 1]) else []

    return {
        "float32": all_are(model.fp32.grad, total, torch.float32),
        "in place": bool((model.bucket == total).all()),
        "float64 as such": all_are(model.fp64.grad, total + comm.size * 2.0**-40, torch.float64),
        "bfloat16": all_are(model.bf16.grad, total, torch.bfloat16),
        "complex64": all_are(model.complex64.grad, total * (1 + 2j), torch.complex64),
        "complex128": all_are(
            model.complex128.grad, total - comm.size * 2.0**-40 * 1j, torch.complex128
        ),
        "sparse": rows(model.sparse) == [comm.size, *(int(r < comm.size) for r in range(4))],
        "one rank's sparse": rows(model.sparse_on_rank_1) == [0, 0, 0, 1, 0],
        "one rank's dense": rows(model.dense_on_rank_1, sparse=False) == [1, 1, 1, comm.size, 1],
        "one rank's": all_are(model.on_rank_1.grad, 5.0, torch.float32),
        "no rank's": model.nowhere.grad is None,
        "frozen": model.frozen.grad is None,
    }


comm, _ = start()
off: dict[str, float] = {}
for again, schedule in product((True, False), (*SCHEDULES, "auto", "replicated")):
    parts = comm.allgather(gradients(comm, again, schedule))
    off |= {name: max(part[name] for part in parts) for name in parts[0]}
said = comm.allgather(sums(comm))
if comm.rank == 0:
    by_name = {name: [part[name] for part in said] for name in said[0]}
    json.dump({"gradients": off, "sums": by_name}, sys.stdout)
finish(comm)
