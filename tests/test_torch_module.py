"""`CrossAttention` with and without recomputation: what it keeps, and that it computes the same."""

# ruff: noqa: E402 - what follows needs torch

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint

from benchmarks.activations import Layers, saved_bytes
from lvxattn.torch_impl import CrossAttention, cross_attention, sum_gradients
from lvxattn.torch_impl.group import Group
from tests.launch import environment
from tests.tolerances import UNIT, summed
from tests.torch_ranks import torch_report

# Proportions of a real model: 4 query heads to a key-value head, S_Q = E, S_KV = 16 S_Q.
B, LAYERS, E, H = 2, 8, 32, 4
S_Q, S_KV = E, 16 * E
# A gradient passes through some 16 products a layer; the longest sum is that over all keys.
LIMIT = 4 * 16 * summed(UNIT["float64"], B * S_KV)


def layers(again: bool, count: int = LAYERS, **options: Any) -> Layers:
    """Layers of the same weights, whether they recompute or not."""
    torch.manual_seed(0)
    return Layers(count, E, H, num_kv_heads=1, recompute_kv=again, dtype=torch.float64, **options)


def inputs(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    options = {"dtype": torch.float64, "requires_grad": True} | options
    return torch.randn(B, S_Q, E, **options), torch.randn(B, S_KV, E, **options)


def run(model: Callable[..., Any], x: Any, features: Any, parameters: Iterable[Any]) -> list[Any]:
    """Return out and the gradients of all leaves; None where there is none."""
    leaves = [x, features, *parameters]
    for leaf in leaves:
        leaf.grad = None
    out = model(x, features)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def apart(results: list[Any], wanted: list[Any]) -> float:
    """Return the largest difference, relative to each tensor's largest element."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, wanted, strict=True)
    )


def test_memory_saved_by_recomputation() -> None:
    x, features = inputs()
    again, kept = (saved_bytes(layers(a), x, features) for a in (True, False))
    assert sum(again.values()) <= 0.40 * sum(kept.values())
    narrow = 8 * B * S_Q * E
    # Nothing twice, nothing else; the features once for all layers, lse and what it has lost.
    assert again == {
        "x": LAYERS * narrow, "out": LAYERS * narrow, "lse": LAYERS * 2 * 8 * B * H * S_Q,
        "features": 16 * narrow,
    }  # fmt: skip
    assert kept == {**again, "q": LAYERS * narrow, "k": 32 * narrow, "v": 32 * narrow}


def test_layers_share_features() -> None:
    given = inputs()
    counted = [saved_bytes(layers(True, count=n), *given) for n in (1, 2, 3)]
    first, second = ({n: b[n] - a[n] for n in a} for a, b in pairwise(counted))
    assert first == second
    assert first["features"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_are_saved_once_in_any_dtype(dtype: Any) -> None:
    x, features = inputs(dtype=dtype)
    counted = saved_bytes(layers(True).to(dtype), x, features)
    assert counted.keys() == {"x", "out", "lse", "features"}
    assert counted["features"] == features.nbytes
    assert counted["out"] == counted["x"] == LAYERS * x.nbytes


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_equal_those_without_recomputation(bias: bool) -> None:
    given = inputs()
    results = []
    for again in (True, False):
        model = layers(again, bias=bias)
        assert len(list(model.parameters())) == LAYERS * (8 if bias else 4)
        results.append(run(model, *given, model.parameters()))
    if bias:  # a key's bias shifts all scores of a query alike: its gradient is 0 but for rounding
        names = ["out", "x", "features", *dict(model.named_parameters())]
        of_keys = [i for i, name in enumerate(names) if name.endswith("k_proj.bias")]
        for i in reversed(of_keys):
            tiny = max(float(result.pop(i).abs().max()) for result in results)
            assert tiny <= LIMIT * float(results[1][2].abs().max()) * S_KV
    assert apart(*results) <= LIMIT


@pytest.mark.parametrize(
    "frozen",
    [
        ["features"], ["x"], ["q_proj"], ["k_proj"], ["v_proj"], ["x", "q_proj"],
        ["features", "k_proj", "v_proj"], ["x", "q_proj", "k_proj", "v_proj"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_frozen_parameters_get_no_gradient(frozen: list[str]) -> None:
    x, features = inputs()
    results = []
    for again in (True, False):
        model = layers(again, count=2, bias=True)
        named = {"x": x, "features": features, **dict(model.named_parameters())}
        cold = [any(part in name for part in frozen) for name in named]
        for leaf, no in zip(named.values(), cold, strict=True):
            leaf.requires_grad_(not no)
        _, *grads = run(model, x, features, model.parameters())
        assert [grad is None for grad in grads] == cold
        results.append({n: g for n, g in zip(named, grads, strict=True) if g is not None})
    x.requires_grad_()
    features.requires_grad_()
    # The gradient of the keys' bias is nothing but rounding.
    names = [name for name in results[0] if not name.endswith("k_proj.bias")]
    assert apart(*([result[name] for name in names] for result in results)) <= LIMIT


def test_frozen_queries_keep_no_keys_either() -> None:
    x, features = inputs()
    model = layers(True, count=1)
    x.requires_grad_(False)
    model.layers[0].q_proj.requires_grad_(False)
    assert saved_bytes(model, x, features).keys() <= {"x", "out", "lse", "features"}


def test_autocast_with_recomputation() -> None:
    given = inputs(dtype=torch.float32)
    results = []
    for again in (True, False):
        model = layers(again, count=1).to(torch.float32)

        def cast(x: Any, features: Any, layer: Any = model.layers[0]) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x, features)

        results.append(run(cast, *given, model.parameters()))
        assert results[-1][0].dtype == torch.bfloat16
        assert {grad.dtype for grad in results[-1][1:]} == {torch.float32}
    # A gradient of the features is the sum of two that were rounded, and may be rounded itself.
    assert apart(*results) <= 4 * UNIT["bfloat16"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_checkpointing_does_not_change_results(again: bool, reentrant: bool) -> None:
    given = inputs()
    model = layers(again, count=2)

    def checkpointed(x: Any, features: Any) -> Any:
        for layer in model.layers:
            x = x + checkpoint(layer, x, features, use_reentrant=reentrant)
        return x

    plain = run(model, *given, model.parameters())
    results = run(checkpointed, *given, model.parameters())
    assert torch.equal(results[0], plain[0])
    # All the same bits, but for the order in which gradients of the features are added up.
    assert apart(results, plain) <= LIMIT


def test_state_dict_does_not_depend_on_recomputation() -> None:
    given = inputs()
    options: dict[str, Any] = {"num_kv_heads": 1, "bias": True, "dtype": torch.float64}
    one = CrossAttention(E, H, recompute_kv=True, **options)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = CrossAttention(E, H, recompute_kv=False, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    names = [f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    assert list(one.state_dict()) == list(other.state_dict()) == names
    with torch.no_grad():
        assert apart([one(*given)], [other(*given)]) <= LIMIT


@pytest.mark.parametrize("compiled", [False, True])
def test_grid_reaches_the_attention(compiled: bool) -> None:
    (x, features), layer = inputs(), layers(again=True, count=1)
    model: Any = layer.layers[0]
    want = model(x, features)
    if compiled:
        model = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(model(x, features, schedule="grid", grid=(1, 1)), want)
    with pytest.raises(ValueError, match=r"grid: .* product is P = 1, got .*2, 1"):
        model(x, features, schedule="grid", grid=(2, 1))


def test_gradients_without_process_group() -> None:
    model = layers(True, count=1)
    _, _, _, *grads = run(model, *inputs(), model.parameters())
    before = [grad.clone() for grad in grads]
    sum_gradients(model)
    assert all(
        p.grad is grad and torch.equal(grad, old)
        for p, grad, old in zip(model.parameters(), grads, before, strict=True)
    )


@pytest.mark.parametrize("late", [False, True])
def test_default_group_ends_when_it_is_destroyed(late: bool) -> None:
    """An optimizer's first step imports functions whose defaults are the default group.

    So would we, if we imported them with the group there.
    """
    start = """
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
"""
    use = """
x = torch.ones(1, requires_grad=True)
x.sum().backward()
torch.optim.AdamW([x]).step()
"""
    ours = "import lvxattn.torch_impl"
    program = f"""
import weakref
import torch, torch.distributed as dist
{start + ours if late else ours + start + use}
assert group() is dist.group.WORLD
dist.destroy_process_group()
assert group() is None
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), timeout=200)


@pytest.mark.parametrize("again", [False, True])
def test_group_is_released_with_the_last_result(again: bool) -> None:
    # One that a circle of references holds at the end of a program aborts it, now and then.
    group = Group(None)
    left = weakref.ref(group)
    gc.disable()
    try:
        model = layers(again, count=1, group=group)
        run(model, *inputs(), model.parameters())
        del model, group
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("P", [2, 3])
def test_gradients_of_all_ranks_add_up(P: int) -> None:
    report = torch_report(P, "torch_module.py")
    for name, difference in report["gradients"].items():
        assert difference <= LIMIT, name
    verdicts = report["sums"]
    assert verdicts == {name: [True] * P for name in verdicts}
    assert len(verdicts) == 12


def test_module_with_group_is_copyable_but_not_picklable() -> None:
    module = CrossAttention(8, 2)
    module.group = Group(None)
    assert copy.deepcopy(module).group is module.group
    with pytest.raises(TypeError, match="group: a process group cannot be pickled"):
        pickle.dumps(module)


def test_processes_without_group_warn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    q = torch.zeros(1, 1, 2, 4)
    with pytest.warns(UserWarning, match="group: 4 processes were started, and each attends alone"):
        cross_attention(q, q, q)
