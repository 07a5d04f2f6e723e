r"""DistributedDataParallel beside context parallelism, on a mesh of two dimensions.

    torchrun --standalone --nproc-per-node 4 -m lvxattn.torch_impl.examples.two_dimensional_mesh

Samples are spread over ``data``, the tokens and the visual features of a sample over ``context``:

                    context 0              context 1
    data 0   rank 0: samples 0-2,   rank 1: samples 0-2,    --> cross-attention goes along a row,
                     first parts            second parts        and so does `sum_gradients`
    data 1   rank 2: samples 3-4,   rank 3: samples 3-4,
                     first parts            second parts
                 |  DistributedDataParallel averages along a column

The loss is a mean over all tokens.  A rank has the sum over its own tokens, and the gradient of the
mean is the sum over all ranks of the gradients of

    loss of a rank = (sum over its own tokens) / (number of tokens of all ranks)

whatever the parts' lengths.  `sum_gradients` adds up, but DistributedDataParallel averages: times
the number of ranks along ``data``, its average is a sum.

Every rank computes the whole batch alone, too, and prints how far apart the two are.  It runs on
GPUs, over NCCL, where each rank of a host has one, else on CPUs over gloo.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lvxattn.torch_impl import CrossAttention, shard, sum_gradients

S_Q, S_KV = 11, 67  # odd numbers, so that no number of ranks cuts them evenly
E, E_V, H, H_KV, LAYERS, VOCABULARY = 32, 24, 8, 2, 2, 50
PADDING = -100  # the target of a token that does not count
RATE = 0.1


def main() -> None:
    """Train for some steps.  Collective: every rank of the program calls this."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=2, help="ranks that share a sample")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--divide-by", choices=("all", "own"), default="all",
        help="own: every rank takes the mean over its own tokens, a mistake, to see what it costs",
    )  # fmt: skip
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("expected to be started by torchrun, as --nproc-per-node 4 -m this module")

    # Both are the same on all ranks where all hosts are alike.
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    ranks, wrong = dist.get_world_size(), False
    if options.context < 1 or ranks % options.context:
        wrong = True
        say(
            f"--context: expected a divisor of the number of ranks, {ranks}, got {options.context}",
            file=sys.stderr,
        )
    else:
        train(device, options.context, options.steps, options.divide_by)
    # The meshes and groups of `train` have been freed: a group that Python objects still hold when
    # the interpreter exits can abort the process.
    dist.barrier()  # rank 0 has printed by now: torchrun ends all ranks with the first that fails
    dist.destroy_process_group()
    if wrong:
        sys.exit(2)


def train(device: torch.device, context: int, steps: int, divide_by: str) -> None:
    """Take some steps on the mesh, and the same in one process.

    Collective: every rank of the program calls this.

    Parameters
    ----------
    device : torch.device
        Of this rank.
    context : int
        The number of ranks that share a sample; a divisor of the number of ranks.
    steps : int
    divide_by : {"all", "own"}
        Whether the loss is a mean over all ranks' tokens, or each rank's over its own.
    """
    data = dist.get_world_size() // context
    mesh = init_device_mesh(device.type, (data, context), mesh_dim_names=("data", "context"))

    torch.manual_seed(0)  # the same weights on all ranks, and on all of `context` they have to be
    model = Model(partial(CrossAttention, group=mesh["context"])).to(device, torch.float64)
    alone = Model(PlainAttention).to(device, torch.float64)
    alone.load_state_dict(model.state_dict())
    parallel = DistributedDataParallel(model, process_group=mesh["data"].get_group())
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    optimizer_alone = torch.optim.SGD(alone.parameters(), RATE)

    say(f"{data} x {context} ranks (data x context), {dist.get_backend()}, {device.type}")
    say(f"{'step':>4}  {'loss on the mesh':<20}  {'loss alone':<20}  gradients differ by")
    for step in range(steps):
        batch = whole_batch(step, 2 * data + 1, device)

        # 1. This rank's part.  A program that trains would load no more than that.
        tokens, targets, frames = part(batch, mesh)
        # 2. Its share of the loss, times the ranks that DistributedDataParallel averages over.
        share = summed_loss(parallel(tokens, frames), targets) / divisor(targets, divide_by)
        (share * data).backward()
        # 3. The gradients are those of all samples by now, for this rank's part of each.
        sum_gradients(model, mesh["context"])
        # 4. They are whole, and the same on all ranks; so are the weights after the step.
        optimizer.step()

        loss = summed_loss(alone(batch.tokens, batch.frames), batch.targets)
        loss = loss / (batch.targets != PADDING).sum()
        loss.backward()
        optimizer_alone.step()

        together = share.detach().clone()
        dist.all_reduce(together)
        apart = largest_difference(model, alone)
        say(f"{step:4}  {together.item():<20.16f}  {loss.item():<20.16f}  {apart:.1e}")
        optimizer.zero_grad()
        optimizer_alone.zero_grad()


class Batch(NamedTuple):
    """Samples, or a rank's part of them.

    Attributes
    ----------
    tokens : (B, s_q), int64
    targets : (B, s_q), int64
        `PADDING` where a sample has ended.
    frames : (B, s_kv, E_V), float64
        Features of an encoder.
    """

    tokens: Tensor
    targets: Tensor
    frames: Tensor


def whole_batch(step: int, samples: int, device: torch.device) -> Batch:
    """Return random samples of different lengths, the same on all ranks."""
    draw = torch.Generator().manual_seed(step)
    tokens, targets = (torch.randint(VOCABULARY, (samples, S_Q), generator=draw) for _ in "xy")
    lengths = torch.randint(S_Q * 2 // 3, S_Q + 1, (samples, 1), generator=draw)
    targets[torch.arange(S_Q) >= lengths] = PADDING
    frames = torch.randn(samples, S_KV, E_V, generator=draw, dtype=torch.float64)
    return Batch(tokens.to(device), targets.to(device), frames.to(device))


def part(batch: Batch, mesh: DeviceMesh) -> Batch:
    """Return this rank's part: samples by ``data``, tokens and frames by ``context``."""
    samples = (shard(x, mesh["data"], axis=0) for x in batch)
    return Batch(*(shard(x, mesh["context"], axis=1).contiguous() for x in samples))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the tokens' losses; padding adds nothing."""
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum"
    )


def divisor(targets: Tensor, divide_by: str) -> Tensor:
    """Return the divisor of this rank's sum, so that all ranks' shares add up to the mean.

    Collective: every rank of the program calls this.  With ``"own"`` the shares are the ranks' own
    means, of equal weight: right only where all ranks have as many tokens that count.
    """
    count = (targets != PADDING).sum()
    if divide_by == "own":
        return count.clamp(min=1) * dist.get_world_size()
    dist.all_reduce(count)
    return count


class Model(nn.Module):
    """A small model that attends from text to frames, and returns logits for every token.

    Parameters
    ----------
    attention : callable
        Creates a layer of cross-attention: `CrossAttention` over ranks, or `PlainAttention`.
    """

    def __init__(self, attention: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, E)
        self.encoder = nn.Linear(E_V, E)  # trained, so that gradients of the features matter
        self.layers = nn.ModuleList(attention(E, H, num_kv_heads=H_KV) for _ in range(LAYERS))
        self.head = nn.Linear(E, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, frames: Tensor) -> Tensor:
        """Return the logits (B, s_q, VOCABULARY) of this rank's tokens."""
        x = self.embedding(tokens)  # (B, s_q, E)
        features = self.encoder(frames)  # (B, s_kv, E), read by all layers
        for layer in self.layers:
            x = x + layer(x, features)
        logits: Tensor = self.head(x)
        return logits


class PlainAttention(nn.Module):
    """The same as `CrossAttention`, in one process and without this package."""

    def __init__(self, embed_dim: int, num_heads: int, *, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Attend from x (B, S_Q, E) to features (B, S_KV, E); returns (B, S_Q, E)."""
        q, k, v = (
            heads.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, H or H_KV, S, D)
            for heads in (self.q_proj(x), self.k_proj(features), self.v_proj(features))
        )
        attend = nn.functional.scaled_dot_product_attention
        out = attend(q, k, v, enable_gqa=True)  # (B, H, S_Q, D)
        joined: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, S_Q, E)
        return joined


def largest_difference(model: nn.Module, alone: nn.Module) -> float:
    """Return the largest difference of gradients, relative to each parameter's largest."""
    apart = []
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        # Every parameter has a gradient here: no loss is without a token.
        assert p.grad is not None
        assert q.grad is not None
        apart.append(float((p.grad - q.grad).abs().max() / q.grad.abs().max()))
    return max(apart)


def say(text: str, file: TextIO = sys.stdout) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, file=file, flush=True)


if __name__ == "__main__":
    main()
