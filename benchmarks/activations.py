"""Bytes that layers of cross-attention store between forward and backward."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from lvxattn.torch_impl import CrossAttention


class Layers(nn.Module):
    """Layers of cross-attention around a residual stream, all reading the same features.

    Parameters
    ----------
    count : int
    embed_dim, num_heads, **options
        As in `CrossAttention`.
    """

    def __init__(self, count: int, embed_dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CrossAttention(embed_dim, num_heads, **options) for _ in range(count)
        )

    def forward(self, x: Tensor, features: Tensor, **options: Any) -> Tensor:
        """Return x (B, s_q, E) plus the outputs of all layers."""
        for layer in self.layers:
            x = x + layer(x, features, **options)
        return x


def saved_bytes(model: Layers, x: Tensor, features: Tensor, **options: Any) -> dict[str, int]:
    """Return the bytes of activations that autograd stores for the backward, by name.

    A storage counts once, however many tensors share it; parameters do not count.  A tensor without
    a name is ``"lse"`` if it has that shape (lse and its rounding error), or else ``"other"``.
    """
    parameters = {storage(p) for p in model.parameters()}
    names: dict[int, str] = {}
    seen: dict[int, Tensor] = {}
    alive: list[Tensor] = []  # its identity is a storage's only while that is alive

    def name(tensor: Tensor, as_what: str) -> None:
        names.setdefault(storage(tensor), as_what)
        alive.append(tensor.detach())

    def pack(tensor: Tensor) -> Tensor:
        if storage(tensor) not in parameters:
            seen.setdefault(storage(tensor), tensor.detach())
        return tensor.detach()

    name(features, "features")
    handles = []
    for layer in model.layers:
        handles += [
            layer.register_forward_pre_hook(lambda _, given: name(given[0], "x")),
            layer.out_proj.register_forward_pre_hook(lambda _, given: name(given[0], "out")),
        ]
        if not layer.recompute_kv:  # which keeps none of them
            handles += [
                layer.q_proj.register_forward_hook(lambda _, __, q: name(q, "q")),
                layer.k_proj.register_forward_hook(lambda _, __, k: name(k, "k")),
                layer.v_proj.register_forward_hook(lambda _, __, v: name(v, "v")),
            ]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, features, **options)
    for handle in handles:
        handle.remove()

    layer = model.layers[0]
    lse = (x.shape[0], layer.num_heads, x.shape[1])
    counted: dict[str, int] = {}
    for address, tensor in seen.items():
        kind = names.get(address, "lse" if tensor.shape == lse else "other")
        counted[kind] = counted.get(kind, 0) + tensor.untyped_storage().nbytes()
    return counted


def storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, which its views share; of a DTensor's own part.

    Not the address of its data: FSDP frees that of weights, and others get the address.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local().detach()
    return int(tensor.untyped_storage()._cdata)


def peak_bytes(model: Layers, x: Tensor, features: Tensor) -> int:
    """Return the peak of memory of tensors in a step, in bytes beyond those held before.

    On the CPU.  Counts what PyTorch's allocator allocates: activations, temporaries, gradients; not
    the workspace of a BLAS.
    """
    leaves = [t for t in (x, features, *model.parameters()) if t.requires_grad]
    # The profiler's library would announce its start and end on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:  # fmt: skip
        grads = torch.autograd.grad(model(x, features).sum(), leaves)
    del grads
    held = most = 0
    # No public form of the trace has every allocation; this one is internal to PyTorch.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
