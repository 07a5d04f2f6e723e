"""Sharded models, and the same in one process; and how programs that check them report."""

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lvxattn.torch_impl import CrossAttention
from lvxattn.torch_impl.examples.fully_sharded import gradients
from lvxattn.torch_impl.examples.two_dimensional_mesh import (
    PADDING,
    Batch,
    Model,
    PlainAttention,
    summed_loss,
    whole_batch,
)
from tests.programs.start import finish, start

Found = dict[str, Any]
Checks = dict[str, Callable[[DeviceMesh], Found]]
SAMPLES = 5
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def report(checks: Checks) -> None:
    """Print as JSON, on rank 0, by check and name what each rank has found.

    The program's arguments are the number of ranks along ``context`` and names of checks; default:
    all of them.
    """
    comm, _ = start()
    torch.set_num_threads(1)
    # FSDP fears that somebody writes to what a linear layer returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    context, *names = sys.argv[1:]
    shape = comm.size // int(context), int(context)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "context"))
    by_check = {}
    for name in names or checks:
        found = comm.allgather(checks[name](mesh))
        by_check[name] = {key: [each[key] for each in found] for key in found[0]}
    if comm.rank == 0:
        json.dump(by_check, sys.stdout)
    finish(comm)


def a_batch(step: int = 0) -> Batch:
    return whole_batch(step, SAMPLES, torch.device("cpu"))


def meshes(mesh: DeviceMesh) -> dict[str, DeviceMesh]:
    """Return what `fully_shard` may be given: all ranks, or weights sharded over `context`."""
    return {"flat": init_device_mesh("cpu", (dist.get_world_size(),)), "hsdp": mesh}


def models(
    mesh: DeviceMesh, over: DeviceMesh | None, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, Any]:
    """Return a model, sharded by layers if `over` is given, and the same one in one process."""
    torch.manual_seed(0)
    model = Model(partial(CrossAttention, group=mesh["context"])).to(dtype)
    alone = Model(PlainAttention).to(dtype)
    alone.load_state_dict(model.state_dict())
    if over is not None:
        shard_layers(model, over, **options)
    return model, alone


def shard_layers(model: Any, over: DeviceMesh, **options: Any) -> None:
    for layer in model.layers:
        fully_shard(layer, mesh=over, **options)
    fully_shard(model, mesh=over, **options)


def summed(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float64) -> Tensor:
    return summed_loss(model(batch.tokens, batch.frames.to(dtype)), batch.targets)


def alone_gradients(model: nn.Module, batch: Batch, **options: Any) -> list[Tensor]:
    """Return the gradients of the mean over all tokens, in one process."""
    (summed(model, batch, **options) / (batch.targets != PADDING).sum()).backward()
    return gradients(model)
