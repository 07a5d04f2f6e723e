"""What layers of cross-attention keep between forward and backward, counted byte by byte."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

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
        """Return x (B, s_q, E) with what all layers have added to it."""
        for layer in self.layers:
            x = x + layer(x, features, **options)
        return x


def saved_bytes(model: Layers, x: Tensor, features: Tensor, **options: Any) -> dict[str, int]:
    """Return how many bytes of activations autograd keeps for the backward, by what they are.

    A storage counts once, whole, however many tensors see it; parameters do not count, as they are
    there in any case.  What has no name of its own is ``"lse"`` by its shape, as is what that has
    lost in rounding, or else ``"other"``.
    """
    parameters = {storage(p) for p in model.parameters()}
    names: dict[int, str] = {}
    seen: dict[int, Tensor] = {}
    alive: list[Tensor] = []  # an address stands for a storage only as long as that is alive

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
    """Return the address of a tensor's storage, which its views have, too."""
    return tensor.untyped_storage().data_ptr()


def peak_bytes(model: Layers, x: Tensor, features: Tensor) -> int:
    """Return the most bytes that tensors hold at once in a step, beyond those there before.

    On the CPU.  What PyTorch's allocator hands out counts: activations, temporaries, gradients; a
    BLAS's own workspace does not.
    """
    leaves = [t for t in (x, features, *model.parameters()) if t.requires_grad]
    # The profiler's library would announce its start and end on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:  # fmt: skip
        grads = torch.autograd.grad(model(x, features).sum(), leaves)
    del grads
    held = most = 0
    # The trace has no public form that has every allocation in it; this one is PyTorch's own.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
