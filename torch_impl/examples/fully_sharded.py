r"""FSDP2 beside context parallelism: weights, gradients and optimizer are sharded over all ranks.

    torchrun --standalone --nproc-per-node 4 -m lvxattn.torch_impl.examples.fully_sharded

Samples, tokens and features are spread over ``data`` and ``context`` as in `two_dimensional_mesh`.
Of every weight each rank holds a quarter, or with ``--hsdp`` a half, which is replicated:

                context 0    context 1                              context 0    context 1
    data 0     1st quarter  2nd quarter             data 0           1st half     2nd half
    data 1     3rd quarter  4th quarter             data 1           1st half     2nd half

`fully_shard` averages gradients over the ranks of its mesh, which are all ranks in both: it takes
the place of DistributedDataParallel and of `sum_gradients`.  The average of the gradients of

    loss of a rank = (number of ranks) (sum over its own tokens) / (number of tokens of all ranks)

is the gradient of the mean over all tokens.  With micro batches, all of them count.

``--checkpoint FOLDER`` continues from the newest checkpoint that is there, and writes one at the
end, each rank its own shards; any number of ranks may continue:

    torchrun ... --nproc-per-node 4 -m ... --checkpoint run                # steps 0 to 2
    torchrun ... --nproc-per-node 2 -m ... --checkpoint run --context 1    # steps 3 to 5

Every rank computes all steps alone, too, and rank 0 prints how far apart the two are.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from lvxattn.torch_impl import CrossAttention

from .two_dimensional_mesh import (
    PADDING,
    RATE,
    Batch,
    Model,
    PlainAttention,
    divisor,
    part,
    say,
    summed_loss,
    whole_batch,
)

SAMPLES = 11  # of a batch
MOMENTUM, NORM = 0.9, 0.5  # of SGD; the norm that gradients are clipped to


def main() -> None:
    """Train for some steps.  Collective: every rank of the program calls this."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=2, help="ranks that share a sample")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--hsdp", action="store_true", help="shard over context, replicate over data"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="micro batches of a step")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("expected to be started by torchrun, as --nproc-per-node 4 -m this module")

    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    wrong = problem(options, dist.get_world_size())
    if wrong:
        say(wrong, file=sys.stderr)
    else:
        train(device, options)
    # As in `two_dimensional_mesh`.
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit(2)


def problem(options: argparse.Namespace, ranks: int) -> str:
    """Return what is wrong with the options, the same on all ranks; nothing if they are right."""
    context, accumulate, folder = options.context, options.accumulate, options.checkpoint
    if context < 1 or ranks % context:
        return f"--context: expected a divisor of the number of ranks, {ranks}, got {context}"
    if options.steps < 1:
        return f"--steps: expected a whole number from 1 up, got {options.steps}"
    data = ranks // context
    if accumulate < 1 or data * accumulate > SAMPLES:
        return (
            f"--accumulate: expected a whole number from 1 up, and one of {SAMPLES} samples for "
            f"each micro batch of {data} ranks along data, got {accumulate}"
        )
    if folder and folder.exists() and not saved_steps(folder):
        return f"--checkpoint: expected a folder of checkpoints, or none that exists, got {folder}"
    return ""


def train(device: torch.device, options: argparse.Namespace) -> None:
    """Take some steps with sharded weights, and the same in one process.

    Collective: every rank of the program calls this.

    Parameters
    ----------
    device : torch.device
        Of this rank.
    options : argparse.Namespace
        Of the command line.
    """
    ranks = dist.get_world_size()
    shape = ranks // options.context, options.context
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))
    # Of one dimension: all ranks.  Of two: weights are sharded over the second.
    over = mesh if options.hsdp else init_device_mesh(device.type, (ranks,))

    torch.manual_seed(0)  # the same weights on all ranks: each keeps its part of its own
    model = Model(partial(CrossAttention, group=mesh["context"])).to(device, torch.float64)
    alone = Model(PlainAttention).to(device, torch.float64)
    alone.load_state_dict(model.state_dict())
    for layer in model.layers:
        fully_shard(layer, mesh=over)  # gathered when it is used, and freed after that
    sharded = fully_shard(model, mesh=over)  # what is not in a layer
    # The optimizers come after: their state is sharded as the weights are.
    optimizer, optimizer_alone = (
        torch.optim.SGD(m.parameters(), RATE, momentum=MOMENTUM) for m in (model, alone)
    )
    folder: Path | None = options.checkpoint
    first = 0 if folder is None else load(folder, model, optimizer)

    kind = "replicated over data" if options.hsdp else "sharded over all ranks"
    say(
        f"{shape[0]} x {shape[1]} ranks (data x context), {dist.get_backend()}, {device.type}, "
        f"{kind}"
    )
    say(f"{'step':>4}  {'loss on the mesh':<20}  {'loss alone':<20}  "
        "gradients, norm, weights differ by")  # fmt: skip
    for step in range(first + options.steps):
        batch = whole_batch(step, SAMPLES, device)
        loss = summed_loss(alone(batch.tokens, batch.frames), batch.targets)
        loss = loss / (batch.targets != PADDING).sum()
        loss.backward()
        norm_alone = clip_grad_norm_(alone.parameters(), NORM)
        optimizer_alone.step()

        if step >= first:
            # 1. This rank's part of each micro batch.
            parts = [part(micro, mesh) for micro in micro_batches(batch, options.accumulate)]
            # 2. The tokens of all ranks and micro batches, before the first forward.
            count = divisor(torch.cat([mine.targets for mine in parts]), "all")
            together = torch.zeros_like(loss)
            for i, mine in enumerate(parts):
                # 3. Gradients are added up here, and sent in the last backward.
                sharded.set_requires_gradient_sync(i == len(parts) - 1)
                # 4. This rank's share of the loss, times the ranks that FSDP averages over.
                share = summed_loss(model(mine.tokens, mine.frames), mine.targets) / count
                (share * ranks).backward()
                together += share.detach()
            # 5. The norm is that of the whole gradients, of which each rank has a part.
            norm = clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()

            dist.all_reduce(together)
            apart = [
                largest_difference(gradients(model), gradients(alone)),
                largest_difference([norm], [norm_alone]),
                largest_difference([*model.parameters()], [*alone.parameters()]),
            ]  # fmt: skip
            say(f"{step:4}  {together.item():<20.16f}  {loss.item():<20.16f}  "
                f"{apart[0]:.1e}  {apart[1]:.1e}  {apart[2]:.1e}")  # fmt: skip
        optimizer.zero_grad()
        optimizer_alone.zero_grad()
    if folder is not None:
        save(folder, model, optimizer, first + options.steps)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Return a batch in parts, by samples."""
    pieces = zip(*(x.tensor_split(count) for x in batch), strict=True)
    return [Batch(*piece) for piece in pieces]


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint: each rank the shards that it holds.  Collective."""
    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state}
    dcp.save(held, checkpoint_id=folder / f"step-{step}")  # type: ignore[attr-defined]


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read the newest checkpoint, of any number of ranks; return its step, 0 without.  Collective.

    Each rank reads what its own shards need.
    """
    step = max(saved_steps(folder), default=0)
    if step:
        weights, state = get_state_dict(model, optimizer)
        held = {"model": weights, "optimizer": state}
        dcp.load(held, checkpoint_id=folder / f"step-{step}")  # type: ignore[attr-defined]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return step


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of complete checkpoints: their metadata is written last."""
    return [int(found.parent.name[5:]) for found in folder.glob("step-*/.metadata")]


def gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of all parameters; every one has one here."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def whole(x: Tensor) -> Tensor:
    """Return a tensor put together from all ranks' shards.  Collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def largest_difference(sharded: list[Tensor], alone: list[Tensor]) -> float:
    """Return the largest difference, relative to each tensor's largest element.  Collective."""
    return max(
        float((whole(a) - b).abs().max() / b.abs().max())
        for a, b in zip(sharded, alone, strict=True)
    )


if __name__ == "__main__":
    main()
