"""FSDP2 over meshes of ranks, held against one process; prints as `fsdp_models.report` says.

A check is a function of the mesh (data x context) that returns, by name, a verdict, bytes, or the
largest difference from what it is compared with, relative to that.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.activations import Layers, saved_bytes
from lvxattn.torch_impl import shard, sum_gradients
from lvxattn.torch_impl.examples.fully_sharded import gradients, largest_difference
from lvxattn.torch_impl.examples.two_dimensional_mesh import LAYERS, PADDING, divisor, part
from tests.fsdp_models import (
    BF16,
    Checks,
    Found,
    a_batch,
    alone_gradients,
    meshes,
    models,
    report,
    shard_layers,
    summed,
)

CHECKS: Checks = {}


def check(function: Callable[[DeviceMesh], Found]) -> Callable[[DeviceMesh], Found]:
    CHECKS[function.__name__] = function
    return function


@check
def loss_times_the_ranks_is_right(mesh: DeviceMesh) -> Found:
    """The mean over all tokens, and the sum, by FSDP's own average."""
    found = {}
    batch = a_batch()
    mine = part(batch, mesh)
    for (name, over), reduction in product(meshes(mesh).items(), ("mean", "sum")):
        model, alone = models(mesh, over)
        count = divisor(mine.targets, "all") if reduction == "mean" else torch.tensor(1)
        (summed(model, mine) / count * dist.get_world_size()).backward()
        wanted = alone_gradients(alone, batch)
        if reduction == "sum":
            wanted = [grad * (batch.targets != PADDING).sum() for grad in wanted]
        found[f"{name}, {reduction}"] = largest_difference(gradients(model), wanted)
    return found


@check
def a_divisor_of_1_sums(mesh: DeviceMesh) -> Found:
    """The loss as it is.  In float32 gloo must be told to sum: it does not multiply before."""
    found = {}
    batch = a_batch()
    mine = part(batch, mesh)
    count = divisor(mine.targets, "all")
    for (name, over), dtype in product(meshes(mesh).items(), (torch.float64, torch.float32)):
        model, alone = models(mesh, over, dtype)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        (summed(model, mine, dtype) / count).backward()
        wanted = alone_gradients(alone, batch, dtype=dtype)
        found[f"{name}, {dtype}"] = largest_difference(gradients(model), wanted)
    return found


@check
def weights_sharded_over_data_alone(mesh: DeviceMesh) -> Found:
    """FSDP averages along `data`, and `sum_gradients` sums the shards along `context`."""
    batch = a_batch()
    mine = part(batch, mesh)
    model, alone = models(mesh, mesh["data"])
    (summed(model, mine) / divisor(mine.targets, "all") * mesh["data"].size()).backward()
    sum_gradients(model, mesh["context"])
    return {"gradients": largest_difference(gradients(model), alone_gradients(alone, batch))}


class Counting(TorchDispatchMode):
    """Counts collectives by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


@check
def weights_are_there_whatever_is_frozen_or_prefetched(mesh: DeviceMesh) -> Found:
    """Recomputation uses the weights that the layer's backward has gathered.

    Frames that need no gradient, and text that needs none, do not end a layer's backward before its
    weights have their gradients.
    """
    found: Found = {}
    batch = a_batch()
    mine = part(batch, mesh)
    for way, frozen in product(
        ("implicit", "explicit", "checkpointed"), ("nothing", "frames", "all inputs")
    ):
        model, alone = models(mesh, None)
        if way == "checkpointed":
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        shard_layers(model, meshes(mesh)["flat"], reshard_after_forward=True)
        if way == "explicit":
            for one, other in pairwise(model.layers):
                one.set_modules_to_forward_prefetch([other])
                other.set_modules_to_backward_prefetch([one])
        for each in (model, alone):
            each.encoder.requires_grad_(frozen == "nothing")
            each.embedding.requires_grad_(frozen != "all inputs")
        loss = summed(model, mine) / divisor(mine.targets, "all") * dist.get_world_size()
        name = f"{way}, frozen: {frozen}"
        found[f"{name}: sharded in between"] = all(
            isinstance(p, DTensor) for p in model.parameters()
        )
        loss.backward()
        grads, wanted = gradients(model), alone_gradients(alone, batch)
        found[f"{name}: no gradient is missing"] = len(grads) == len(wanted)
        found[name] = largest_difference(grads, wanted)
    return found


@check
def forwards_come_in_any_order(mesh: DeviceMesh) -> Found:
    """A layer that is used three times, two forwards before their backwards, and evaluation."""
    found: Found = {}
    for way in ("one layer thrice", "two forwards", "evaluation in between"):
        model, alone = models(mesh, None)
        if way == "one layer thrice":
            for each in (model, alone):
                each.layers = nn.ModuleList([each.layers[0]] * 3)
        for layer in set(model.layers):
            fully_shard(layer, mesh=meshes(mesh)["flat"], reshard_after_forward=True)
        fully_shard(model, mesh=meshes(mesh)["flat"])
        losses = [summed(model, part(a_batch(), mesh))]
        batches = [a_batch()]
        with torch.set_grad_enabled(way == "two forwards"):
            losses.append(summed(model, part(a_batch(1), mesh)))
        if way == "two forwards":
            batches.append(a_batch(1))
        for loss, batch in zip(losses, batches, strict=False):
            (loss * dist.get_world_size()).backward()
            summed(alone, batch).backward()
        found[way] = largest_difference(gradients(model), gradients(alone))
    return found


@check
def weights_are_gathered_twice_and_gradients_sent_once(mesh: DeviceMesh) -> Found:
    """In the forward and in the backward: not once more to recompute."""
    model, _ = models(mesh, meshes(mesh)["flat"], reshard_after_forward=True)
    mine = part(a_batch(), mesh)
    with Counting() as counting:
        summed(model, mine).backward()
    groups = LAYERS + 1  # the layers, and what is in none
    return {
        "gathered": counting.counts["_allgather_base_"] == 2 * groups,
        "sent": counting.counts["_reduce_scatter_base_"] == groups,
    }


@check
def compiled_layers_in_a_sharded_model(mesh: DeviceMesh) -> Found:
    """Each layer compiled by itself, without a graph break, and both by one program."""
    warnings.simplefilter("ignore")  # Dynamo trips over its own
    torch.compiler.reset()
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    model, alone = models(mesh, None)
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    shard_layers(model, meshes(mesh)["flat"], reshard_after_forward=True)
    found: Found = {}
    for step in range(2):
        batch = a_batch(step)
        mine = part(batch, mesh)
        loss = summed(model, mine) / divisor(mine.targets, "all") * dist.get_world_size()
        loss.backward()
        wanted = alone_gradients(alone, batch)
        found[f"step {step}"] = largest_difference(gradients(model), wanted)
        model.zero_grad()
        alone.zero_grad()
    found["compiled once"] = stats["unique_graphs"] - before == 1
    return found


@check
def nothing_but_shards_is_kept(mesh: DeviceMesh) -> Found:
    """Bytes that autograd holds between forward and backward, as of the plain layers."""
    torch.manual_seed(0)
    x = shard(torch.randn(2, 16, 32), mesh["context"], axis=1).contiguous().requires_grad_()
    frames = shard(torch.randn(2, 128, 32), mesh["context"], axis=1).contiguous()
    found: Found = {}
    ways: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"mp_policy": BF16},
        "layers alone in bf16": {"mp_policy": BF16, "root": False},
        "weights kept": {"reshard_after_forward": False},
        "keys kept": {"recompute_kv": False},
    }
    for name, way in ways.items():
        given = {"reshard_after_forward": True} | way
        again, root = given.pop("recompute_kv", True), given.pop("root", True)
        model = Layers(3, 32, 4, num_kv_heads=1, recompute_kv=again, group=mesh["context"])
        for layer in model.layers:
            fully_shard(layer, mesh=meshes(mesh)["flat"], **given)
        if root:
            fully_shard(model, mesh=meshes(mesh)["flat"], **given)
        found[name] = saved_bytes(model, x, frames)
    rows, out_proj = x[..., 0].numel(), model.layers[0].out_proj.weight
    found["sizes"] = {
        "x": x.nbytes, "features": frames.nbytes, "lse": 4 * 4 * rows, "layers": len(model.layers),
        "out_proj": 4 * out_proj.numel(),
    }  # fmt: skip
    return found


report(CHECKS)
