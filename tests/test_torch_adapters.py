"""Keys and values are made again by whatever makes them: adapters, hooks, callables of any kind."""

# ruff: noqa: E402 - what follows needs torch

from collections import Counter
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lvxattn.torch_impl import CrossAttention, cross_attention, cross_attention_layer
from tests.adapters import (
    CHANGES,
    E_V,
    H_KV,
    LIMIT,
    PROJECTIONS,
    S_KV,
    S_Q,
    B,
    D,
    E,
    H,
    apart,
    changed,
    compared,
    inputs,
    module,
    replaced,
    step,
)
from tests.errors import says
from tests.tolerances import UNIT
from tests.torch_ranks import torch_report


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_work_for_one_or_two_calls(change: str) -> None:
    found = compared(CHANGES[change], *inputs())
    assert found["apart"] <= LIMIT
    assert found["changed"] > 1e-4


@pytest.mark.mpi
def test_adapters_work_with_fsdp_on_several_ranks() -> None:
    reports = torch_report(2, "torch_adapters.py")
    assert len(reports) == 2
    for report in reports:
        assert len(report) == len(CHANGES) + 6
        for name, found in report.items():
            assert found["apart"] <= LIMIT, name
            assert found["changed"] > 1e-4, name


def kept(model: Any, x: Any, y: Any) -> int:
    """Return the bytes that a forward keeps for its backward, beside parameters and their like."""
    held: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        if tensor.shape[:1] == (B,):  # a storage counts once, however many tensors see it
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x, y)
    assert out.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("change", CHANGES)
def test_adapter_results_are_not_saved(change: str) -> None:
    x, y = (a.requires_grad_() for a in inputs())
    model = module(True)
    plain = kept(model, x, y)
    # x, out, lse and what it has lost; features
    assert plain == 8 * B * (S_Q * (E + H * D + 2 * H) + S_KV * E_V)
    with changed(model, CHANGES[change]):
        assert kept(model, x, y) == plain


class Widened(torch.nn.Module):
    """A projection whose result is float32 under autocast, as many norms' is."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Any) -> Any:
        return self.base(x).float()


def test_autocast_casts_wide_projections() -> None:
    results = []
    for recompute_kv in (True, False):
        model = module(recompute_kv, dtype=torch.float32)
        replaced(Widened, "k_proj")(model)
        autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        results.append(step(model, *inputs(torch.float32), around=autocast))
        assert results[-1]["out"].dtype == torch.bfloat16
    assert apart(*results) <= 4 * UNIT["bfloat16"]


def test_hooks_run_as_under_checkpointing() -> None:
    runs = []
    for recompute_kv in (True, False):
        model, seen = module(recompute_kv), Counter[str]()

        def see(event: str, *_: Any, seen: Counter[str] = seen) -> None:
            seen[event] += 1

        for name in PROJECTIONS:
            projection = getattr(model, name)
            projection.register_forward_hook(partial(see, f"{name} forward"))
            projection.register_full_backward_hook(partial(see, f"{name} backward"))
            projection.weight.register_hook(partial(see, f"{name} gradient"))
            projection.weight.register_post_accumulate_grad_hook(partial(see, f"{name} grad"))
        run = model if recompute_kv else partial(checkpoint, model, use_reentrant=False)
        x, y = (a.requires_grad_() for a in inputs())
        run(x, y).sum().backward()
        runs.append(seen)
    assert runs[0] == runs[1]
    events = {"forward": 2, "backward": 1, "gradient": 1, "grad": 1}
    assert runs[0] == {f"{p} {event}": n for p in PROJECTIONS for event, n in events.items()}


def layer_inputs() -> list[Any]:
    """Return queries, features, and a weight that makes keys and values at once, as leaves."""
    torch.manual_seed(0)
    shapes = (B, H, S_Q, D), (B, S_KV, E_V), (2 * H_KV * D, E_V)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def both_at_once(y: Any, w: Any) -> Any:
    k, v = (y @ w.T).unflatten(-1, (2, H_KV, D)).permute(2, 0, 3, 1, 4)  # one storage
    return k, v


def one_for_both(y: Any, w: Any) -> Any:
    k, _ = both_at_once(y, w)
    return k, k


def features_as_they_are(y: Any, w: Any) -> Any:
    return y[:, None, :, :D].expand(-1, H_KV, -1, -1), both_at_once(y, w)[1]


def of_no_weight(y: Any, w: Any) -> Any:
    k = y[..., : H_KV * D].unflatten(-1, (H_KV, D)).transpose(1, 2)
    return k, k.square()


MAKERS = both_at_once, one_for_both, features_as_they_are, of_no_weight


def layer(make: Any, q: Any, y: Any, w: Any, **options: Any) -> Any:
    return cross_attention_layer(q, y, lambda y: make(y, w), **options)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("trained", ["qyw", "q", "y", "w", "qw", "yw"])
def test_any_callable_gives_gradients_of_saved_keys(make: Any, trained: str) -> None:
    leaves = dict(zip("qyw", layer_inputs(), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    q, y, w = leaves.values()
    made_again = layer(make, q, y, w, return_lse=True)
    plain = cross_attention(q, *make(y, w), return_lse=True)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if make is of_no_weight and trained == "w":
        assert not made_again[0].requires_grad
        return
    losses = [out.square().sum() + lse.sum() for out, lse in (made_again, plain)]
    grads = [torch.autograd.grad(loss, wanted, allow_unused=True) for loss in losses]
    assert torch.equal(made_again[0], plain[0])
    names = [name for name in trained if name != "w" or make is not of_no_weight]
    assert apart(*(dict(zip(names, got, strict=False)) for got in grads)) <= LIMIT
    assert all((g is None) == (n not in names) for n, g in zip(trained, grads[0], strict=True))


def test_retained_graph_recomputes_for_each_backward() -> None:
    leaves, calls = layer_inputs(), []

    def make(y: Any, w: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return both_at_once(y, w)

    out = layer(make, *leaves)
    once, twice = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert calls == [True] * 3
    assert apart(*(dict(zip("qyw", got, strict=True)) for got in (once, twice))) <= LIMIT
    assert all(leaf.grad is None for leaf in leaves)  # of which nobody has spoken
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_recomputation_without_gradients(mode: Any) -> None:
    leaves, calls = layer_inputs(), []

    def make(y: Any, w: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return both_at_once(y, w)

    with mode():
        out = layer(make, *leaves)
    assert calls == [False]
    assert not out.requires_grad
    assert torch.equal(out, cross_attention(leaves[0], *both_at_once(*leaves[1:])).detach())


def test_changed_keys_on_recomputation_raise() -> None:
    q, y, w = layer_inputs()
    lengths = iter((S_KV, S_KV - 1))

    def make(y: Any, w: Any) -> Any:
        return both_at_once(y[:, : next(lengths)], w)

    first, second = (((B, H_KV, s, D), "float64") for s in (S_KV, S_KV - 1))
    text = says("make_kv", (first, first), (second, second), rank=0, of=1)
    with pytest.raises(ValueError, match=text):
        layer(make, q, y, w).sum().backward()


@pytest.mark.parametrize("call", [1, 2])
def test_error_of_callable_is_kept_with_rank_as_note(call: int) -> None:
    q, y, w = layer_inputs()
    calls: list[int] = []

    def make(y: Any, w: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise OSError("the disk is gone")
        return both_at_once(y, w)

    with pytest.raises(OSError, match="the disk is gone") as raised:
        layer(make, q, y, w).sum().backward()
    assert len(calls) == call
    assert "raised on rank 0 of 1" in raised.value.__notes__


def test_weights_changed_in_place_raise() -> None:
    q, y, w = layer_inputs()
    out = layer(both_at_once, q, y, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError) as raised:
        out.sum().backward()
    assert str(raised.value) == (
        "make_kv: expected the features and weights of the forward in the backward, "
        f"got shapes [{tuple(w.shape)}] changed in place; "
        "recompute_kv=False keeps what was made of them (on rank 0 of 1)"
    )
    assert w.grad is None


def test_other_weights_in_functional_call_raise() -> None:
    q, y, _ = layer_inputs()
    given = q.detach()[:, 0], y
    module = CrossAttention(D, 1, kv_dim=y.shape[2], dtype=torch.float64)
    new = {n: (2 * p).detach().requires_grad_() for n, p in module.named_parameters()}
    out = torch.func.functional_call(module, new, given)
    text = says("make_kv", "others, of shapes", rank=0, of=1)
    with pytest.raises(RuntimeError, match=text):
        out.sum().backward()
    module.recompute_kv = False
    torch.func.functional_call(module, new, given).sum().backward()
    assert all(p.grad is not None for p in new.values())
