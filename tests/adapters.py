"""Common changes of a module's projections, and a step that shows their effect.

`CHANGES` are functions that change a `CrossAttention` in place, and return handles to remove, if
any.  Each must change out, and by the same amount whether queries, keys and values are kept or
recomputed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils.parametrizations import weight_norm

from lvxattn.torch_impl import CrossAttention
from tests.tolerances import UNIT, summed

B, S_Q, S_KV, E, E_V, H, H_KV, D = 2, 6, 20, 12, 10, 4, 2, 3
PROJECTIONS = "q_proj", "k_proj", "v_proj"
# Kept or recomputed, the same numbers enter the same products; sums of gradients differ in order.
LIMIT = 16 * summed(UNIT["float64"], B * S_KV)


class LowRank(nn.Module):
    """LoRA: the base is frozen, and a product of two narrow weights is added."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.base(x) + self.up(self.down(x))
        return added


class Magnitudes(LowRank):
    """DoRA: LoRA's weight, its rows normalized to length 1, times a learned magnitude."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.magnitude = nn.Parameter(1.5 * base.weight.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.up.weight @ self.down.weight
        weight = weight * (self.magnitude / weight.norm(dim=1))[:, None]
        return functional.linear(x, weight, self.base.bias)


class Normed(nn.Module):
    """A projection with normalized heads, like a model's k_norm."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.norm = base, nn.LayerNorm(D, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        heads: Tensor = self.norm(self.base(x).unflatten(-1, (-1, D)))
        return heads.flatten(-2)


class Turned(nn.Module):
    """Rotary embedding: pairs of numbers are rotated by an angle proportional to the position."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        even, odd = self.base(x).unflatten(-1, (-1, 2)).unbind(-1)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 7
        turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
        return torch.stack(turned, dim=-1).flatten(-2)


class Int8(torch.Tensor):
    """A frozen weight in 8 bits, which supports only its linear layer."""

    whole: Tensor
    step: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor, step: Tensor) -> "Int8":
        made: Int8 = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=step.dtype)
        made.whole, made.step = whole, step
        return made

    @staticmethod
    def of(weight: Tensor) -> "Int8":
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        return Int8((weight / step).round().to(torch.int8), step)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            x, weight, *bias = args
            return functional.linear(x, weight.whole * weight.step, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].whole, args[0].step)
        raise NotImplementedError(f"{func} of a quantised weight")


Change = Callable[[CrossAttention], Any]


def replaced(by: Callable[[nn.Linear], nn.Module], *names: str) -> Change:
    """Return a change that replaces projections by other modules."""

    def change(module: CrossAttention) -> None:
        for name in names or PROJECTIONS:
            setattr(module, name, by(getattr(module, name)))

    return change


def forward_of_the_instance(module: CrossAttention) -> None:
    for name in PROJECTIONS:
        projection: Any = getattr(module, name)
        projection.forward = lambda z, plain=projection.forward: plain(z) + plain(z * z)


def hooks(module: CrossAttention) -> None:
    module.q_proj.register_forward_hook(lambda _, given, out: 3 * out)
    module.k_proj.register_forward_pre_hook(lambda _, given: (given[0].square(),))
    module.v_proj.register_forward_hook(lambda _, given, out: out + given[0].sum(-1, keepdim=True))


def global_hooks(module: CrossAttention) -> list[Any]:
    def before(which: nn.Module, given: Any) -> Any:
        return (given[0].square(),) if which is module.k_proj else None

    def after(which: nn.Module, given: Any, out: Any) -> Any:
        return 3 * out if which in (module.q_proj, module.v_proj) else None

    return [register_module_forward_pre_hook(before), register_module_forward_hook(after)]


def quantised(module: CrossAttention) -> None:
    for name in PROJECTIONS:
        projection = getattr(module, name)
        weight = Int8.of(projection.weight.detach())
        projection.weight = nn.Parameter(weight, requires_grad=False)


def biased(module: CrossAttention) -> None:
    for name in PROJECTIONS:
        nn.init.normal_(getattr(module, name).bias)


def weight_normed(module: CrossAttention) -> None:
    for name in PROJECTIONS:
        weight = weight_norm(getattr(module, name)).parametrizations["weight"]
        with torch.no_grad():
            weight.original0.mul_(1.5)


CHANGES: dict[str, Change] = {
    "a forward replaced on the instance": forward_of_the_instance,
    "hooks": hooks,
    "global hooks": global_hooks,
    "biases": biased,
    "LoRA": replaced(LowRank),
    "DoRA": replaced(Magnitudes),
    "norms of keys and queries": replaced(Normed, "q_proj", "k_proj"),
    "rotary embedding": replaced(Turned, "q_proj", "k_proj"),
    "a parametrization": weight_normed,
    "frozen weights in 8 bits": quantised,
    "dropout": replaced(lambda base: nn.Sequential(base, nn.Dropout(0.5))),
}


def module(recompute_kv: bool, **options: Any) -> CrossAttention:
    """Return a module with the same weights whether it recomputes or not."""
    torch.manual_seed(0)
    options = {"num_kv_heads": H_KV, "kv_dim": E_V, "dtype": torch.float64, "bias": True} | options
    made = CrossAttention(E, H, recompute_kv=recompute_kv, **options)
    for name in PROJECTIONS:
        nn.init.zeros_(getattr(made, name).bias)
    return made


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the unsharded text and visual features."""
    torch.manual_seed(1)
    return [torch.randn(B, s, e).to(dtype) for s, e in ((S_Q, E), (S_KV, E_V))]


def step(model: nn.Module, x: Tensor, y: Tensor, around: Any = nullcontext) -> dict[str, Any]:
    """Return out and the gradients of all leaves; the forward runs within `around`."""
    leaves = {"x": x.clone().requires_grad_(), "features": y.clone().requires_grad_()}
    torch.manual_seed(2)
    with around():
        out = model(*leaves.values())
    torch.manual_seed(3)  # another state than the forward's
    out.backward(torch.randn(out.shape).to(out.dtype))
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def apart(results: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Return the largest difference, relative to the largest element of any result."""
    assert results.keys() == wanted.keys()
    wanted = {name: whole(x) for name, x in wanted.items()}
    size = max(float(x.abs().max()) for x in wanted.values())
    return max(float((whole(results[name]) - x).abs().max()) for name, x in wanted.items()) / size


def whole(gradient: Any) -> Tensor:
    """Return a gradient, gathered from all ranks, and assert that it is not 0."""
    full: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    assert full.any()
    return full


def compared(change: Change, x: Tensor, y: Tensor, wrap: Any = lambda m: m) -> dict[str, float]:
    """Return the differences between recomputed and kept, and between changed and unchanged."""
    results = []
    for recompute_kv in (True, False):
        model = module(recompute_kv)
        with changed(model, change):
            results.append(step(wrap(model), x, y))
    plain = step(module(False), x, y)["out"]
    return {
        "apart": apart(*results),
        "changed": float((results[0]["out"] - plain).abs().max()),
    }


@contextmanager
def changed(model: CrossAttention, change: Change) -> Iterator[None]:
    """Change a module; global changes end with the block."""
    handles = change(model) or []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
