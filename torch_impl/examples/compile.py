r"""A model with cross-attention over ranks, compiled whole: ``fullgraph=True``, no graph break.

    torchrun --standalone --nproc-per-node 4 -m lvxattn.torch_impl.examples.compile

Each rank's text has another length, and another one in every step.  `mark_dynamic` says so before
the first compilation; without it, PyTorch compiles once more when a length has changed.

    step 1    rank 0: 12 tokens    rank 1: 19     ...     one compilation on each rank
    step 2    rank 0: 15 tokens    rank 1: 7      ...     none

Beside the compiled model runs the same one uncompiled: losses and gradients differ by rounding.
Ranks compile at their own pace, and those that have compiled wait for the others: where compiling
takes long, give the process group a timeout that is longer.
"""

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lvxattn.torch_impl import CrossAttention, sum_gradients

E, E_V, H, H_KV, LAYERS = 32, 24, 8, 2, 2


class Model(nn.Module):
    """Layers of cross-attention and of two products with a nonlinearity, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(
            CrossAttention(E, H, num_kv_heads=H_KV, kv_dim=E_V) for _ in range(LAYERS)
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E))
            for _ in range(LAYERS)
        )

    def forward(self, text: Tensor, video: Tensor) -> Tensor:
        """Attend from this rank's text (B, s_q, E) to all ranks' video (B, s_kv, E_V)."""
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            text = text + attention(text, video)
            text = text + mlp(text)
        return text


def main() -> None:
    """Train for some steps.  Collective: every rank of the program calls this."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("expected to be started by torchrun, as --nproc-per-node 4 -m this module")
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    train(device, options.steps, options.backend)
    dist.barrier()
    dist.destroy_process_group()


def train(device: torch.device, steps: int, backend: str) -> None:
    """Take some steps, compiled and not, and print both losses.

    Collective: every rank of the program calls this.
    """
    torch.manual_seed(0)  # the same weights on all ranks
    model = Model().to(device)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, eager)]

    torch.manual_seed(1 + dist.get_rank())
    say("step  loss, compiled  loss, eager  gradients differ by  compilations")
    for step in range(steps):
        s_q = int(torch.randint(2, 20, ()))
        text = torch.randn(2, s_q, E, device=device)
        video = torch.randn(2, 100, E_V, device=device)
        torch._dynamo.mark_dynamic(text, 1)
        count = torch.tensor(s_q, device=device)
        dist.all_reduce(count)  # tokens on all ranks

        losses = []
        for run, own in ((compiled, model), (eager, eager)):
            own.zero_grad()
            loss = run(text, video).square().sum() / count  # this rank's share of the mean
            loss.backward()
            sum_gradients(own)
            dist.all_reduce(loss.detach_())
            losses.append(float(loss))
        apart = largest_difference(model, eager)
        compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        say(f"{step:4}  {losses[0]:14.6f}  {losses[1]:11.6f}  {apart:19.1e}  {compilations:12}")
        for optimizer in optimizers:
            optimizer.step()


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of gradients, relative to each parameter's largest."""
    apart = []
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        apart.append(float((p.grad - q.grad).abs().max() / q.grad.abs().max()))
    return max(apart)


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
