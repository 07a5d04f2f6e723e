"""Compiled and exported programs: one operator for each attention, and the results of eager."""

# ruff: noqa: E402 - what follows needs torch

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvxattn.torch_impl import (
    CrossAttention,
    Layout,
    Meter,
    cross_attention,
    cross_attention_layer,
)
from lvxattn.torch_impl.layout import record_nbytes
from tests.cases import options_of
from tests.launch import checks_of, environment
from tests.tolerances import UNIT, summed
from tests.torch_ranks import torch_report

# Dynamo trips over its own.
pytestmark = pytest.mark.filterwarnings("ignore")

E, E_V, H, H_KV, S_KV = 16, 10, 4, 2, 30
LIMIT = 4 * 32 * summed(UNIT["float64"], 2 * S_KV)


# What depends on the number of ranks is checked on four: they compile in their own processes.
OF_FOUR = (
    "schedules_masks_and_replicated_sides",
    "lengths_change_without_compiling_again",
    "meshes_and_subgroups_are_found_by_name",
)
OF_TWO = tuple(name for name in checks_of("torch_compiled.py") if name not in OF_FOUR)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("P", "launch", "check"),
    [
        pytest.param(P, launch, check, id=f"{P}-{check}")
        for P, launch in ((2, OF_TWO), (4, OF_FOUR))
        for check in launch
    ],
)
def test_compiled_on_ranks(P: int, launch: tuple[str, ...], check: str) -> None:
    verdicts = torch_report(P, "torch_compiled.py", *launch)[check]
    assert len(verdicts) == P
    assert all(verdict and all(verdict) for verdict in verdicts), verdicts


class Model(nn.Module):
    """Two layers, one of which recomputes keys and values."""

    def __init__(self, recompute: tuple[bool, bool] = (True, False), again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            CrossAttention(E, H, num_kv_heads=H_KV, kv_dim=E_V, recompute_kv=r, dtype=torch.float64)
            for r in recompute
        )
        self.again = again

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            args = x.sin(), y
            x = x + (checkpoint(layer, *args, use_reentrant=False) if self.again else layer(*args))
        return x


class Kept:
    """A backend that traces forward and backward, and keeps both graphs."""

    def __init__(self) -> None:
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: Any, _: Any) -> Any:
            self.graphs.append(graph)
            return make_boxed_func(graph.forward)

        self.graphs: list[Any] = []
        self.compile = aot_autograd(
            fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
        )

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return self.compile(graph, inputs)

    def operators(self) -> list[list[str]]:
        """Return the names of this package's operators in each graph."""
        return [
            [name for node in graph.graph.nodes for name in _named(node)] for graph in self.graphs
        ]


def _named(node: Any) -> list[str]:
    targets = (node.target, *node.args)
    return [str(t).split(".")[1] for t in targets if str(t).startswith("lvxattn.")]


def compiled(function: Any) -> tuple[Any, Kept]:
    torch.compiler.reset()
    backend = Kept()
    return torch.compile(function, fullgraph=True, backend=backend), backend


def inputs(s_q: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(s_q)
    x, y = (torch.randn(2, s, e, dtype=torch.float64) for s, e in ((s_q, E), (S_KV, E_V)))
    return x.requires_grad_(), y.requires_grad_()


def arrays(s_q: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(s_q)
    q, k, v = (
        torch.randn(2, h, s, 8, dtype=torch.float64, requires_grad=True)
        for h, s in ((H, s_q), (H_KV, S_KV), (H_KV, S_KV))
    )
    return q, k, v


def step(function: Callable[..., Tensor], *leaves: Any) -> list[Tensor]:
    out = function(*leaves[:2])
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference, relative to each tensor's largest element."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def test_inductor_compiles_once_for_all_lengths() -> None:
    """With a length that is marked as dynamic; in CI's time, one small model."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = Model()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(model, fullgraph=True, backend=counter)
    # PyTorch's cache of compiled code does not know when an operator has changed.
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        for s_q in (6, 7, 19):
            x, y = inputs(s_q)
            torch._dynamo.mark_dynamic(x, 1)
            weights = list(model.parameters())
            assert apart(step(run, x, y, *weights), step(model, x, y, *weights)) <= LIMIT
    assert counter.frame_count == 1


@pytest.mark.parametrize("again", [False, True])
def test_graphs_hold_one_operator_for_each_attention(again: bool) -> None:
    """A checkpoint around layers does not repeat them: its backward would communicate anew."""
    model = Model(again=again)
    run, backend = compiled(model)
    given = *inputs(6), *model.parameters()
    assert apart(step(run, *given), step(model, *given)) <= LIMIT
    assert backend.operators() == [["attention"] * 2, ["attention_backward"] * 2]


def test_results_that_nobody_reads_are_computed() -> None:
    """Another rank may read its own, and would wait for this one."""
    q, k, v = arrays()

    def attend(q: Tensor) -> Tensor:
        cross_attention(q, k, v)
        return q * 2

    run, backend = compiled(attend)
    run(q)
    assert backend.operators()[0] == ["attention"]


def test_keys_and_values_are_not_saved() -> None:
    """Compiled as in eager: neither they nor the queries, if the layer recomputes them."""
    saved = {}
    for recompute in (True, False):
        run, _ = compiled(Model((recompute, recompute)))
        shapes: list[tuple[int, ...]] = []

        def keep(x: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(x.shape))
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run(*inputs(6))
        saved[recompute] = shapes
    of_keys = (2, H_KV, S_KV, E // H)
    assert saved[False].count(of_keys) == 4
    assert saved[True].count(of_keys) == 0


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_one_operator(strict: bool) -> None:
    model = Model().requires_grad_(False)
    dim = torch.export.Dim
    program = torch.export.export(
        model, tuple(x.detach() for x in inputs(6)), strict=strict,
        dynamic_shapes=({1: dim("s_q")}, {1: dim("s_kv")}),
    )  # fmt: skip
    found = [name for node in program.graph.nodes for name in _named(node)]
    assert found == ["attention"] * 2
    assert torch.equal(program.module()(*inputs(9)), model(*inputs(9)))


@pytest.mark.parametrize("way", ["lv-xattn", "grid", "ulysses", "replicated", "replicated keys"])
def test_operators_keep_pytorch_s_rules(way: str) -> None:
    """Schema, shapes, strides and gradients are what a compiler is told."""
    q, k, v = arrays()
    mask = torch.rand(6, S_KV) > 0.3
    layout = Layout.agree(q, k, v, mask=mask, **options_of(way, 1))
    from lvxattn.torch_impl import operators  # not before: it imports the compiler

    spread = layout.queries, layout.keys
    how = "lv-xattn", None, *spread, "qkv", None, "call"
    torch.library.opcheck(operators.attention, (q, k, v, mask, layout.record, None, "", 1, *how))
    given = q, k, v, mask, layout.record, None, "", 1, "lv-xattn", None, *spread, "qkv", None, "c"
    results = [x.detach() for x in operators.attention(*given)]
    dout, dlse = torch.ones_like(results[0]), torch.ones_like(results[1])
    inner = [x.detach() for x in (q, k, v)]
    for wanted in ("qkv", "q", "kv"):
        given = dout, dlse, *inner, mask, *results, "", wanted
        torch.library.opcheck(operators.attention_backward, given)


def test_operator_takes_a_grid() -> None:
    q, k, v = arrays()
    from lvxattn.torch_impl import operators

    def attend(grid: list[int] | None) -> Any:
        how = "grid", None, "sharded", "sharded", "qkv", grid, "call"
        return operators.attention(q, k, v, None, None, None, "", 1, *how)

    out, lse, _, record = attend([1, 1])
    assert Layout.of_record(record).grid == (1, 1)
    assert all(torch.equal(x, y) for x, y in zip((out, lse), attend(None), strict=False))
    with pytest.raises(ValueError, match=r"grid: expected two numbers whose product is P = 1, got"):
        attend([2, 2])


def test_autocast_is_that_of_eager() -> None:
    q, k, v = (x.detach().float() for x in arrays())

    def cast(q: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = cross_attention(q, k, v)
            return out, cross_attention_layer(q, k, lambda k: (k, v))

    run, _ = compiled(cast)
    for got, want in zip(run(q), cast(q), strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)


def hidden(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Return a mask, as a callable."""
    return (i + j) % 3 > 0


@pytest.mark.parametrize("option", [{"mask": hidden}, {"meter": Meter()}], ids=["mask", "meter"])
def test_callable_masks_and_meters_break_the_graph(option: dict[str, Any]) -> None:
    q, k, v = arrays()

    def attend(q: Tensor) -> Tensor:
        return cross_attention(q.sin(), k, v, **option).cos()

    run, _ = compiled(attend)
    with pytest.raises(RuntimeError, match="a mask that is a callable, and a meter, are not comp"):
        run(q)
    torch.compiler.reset()
    broken = torch.compile(attend, backend="aot_eager")
    assert torch.allclose(broken(q), attend(q), rtol=0, atol=LIMIT)


def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend with a mask that is computed in the program."""
    return cross_attention(q, k, v, mask=bias * 2)


def test_invalid_arguments_name_themselves() -> None:
    """Of the kernels', in a program; others as the compiler sees them, within its own words."""
    q, k, v = arrays()
    run, _ = compiled(cross_attention)
    with pytest.raises(ValueError, match=r"k: expected D = 8 .* got .* \(on rank 0 of 1\)"):
        run(q, k[..., :3], v)
    mask = torch.zeros(S_KV, dtype=torch.float64, requires_grad=True)
    wrong: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (cross_attention, (q[0], k, v), {}, r"q: expected 4 axes \(B, H, s, D\), got shape"),
        (masked, (q, k, v, mask), {}, "mask: expected a constant, got a tensor"),
        (Model(), (inputs(6)[0][..., :9], inputs(6)[1]), {}, r"x: expected shape \(B, s_q, 16\)"),
    ]
    for function, args, options, message in wrong:
        run, _ = compiled(function)
        with pytest.raises(Exception, match=message):
            run(*args, **options)


def test_second_derivatives_are_refused() -> None:
    from lvxattn.torch_impl import operators

    q, k, v = arrays()
    options = (
        None, None, None, "", 1, "lv-xattn", None, "sharded", "sharded", "qkv", None,
        "forward and backward",
    )  # fmt: skip
    out, *_ = operators.attention(q, k, v, *options)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_attention: expected to be differentiated once"):
        dq.sum().backward()


def test_program_of_other_ranks_is_refused() -> None:
    from lvxattn.torch_impl import operators

    q, k, v = arrays()
    spread = "sharded", "sharded"
    options = None, None, None, "", 4, "lv-xattn", None, *spread, "qkv", None, "forward"
    with pytest.raises(ValueError, match=r"group: expected 4 ranks, as when .* compiled, got 1"):
        operators.attention(q, k, v, *options)


def test_program_exported_with_frozen_weights_differentiates_others() -> None:
    model = Model()
    given = tuple(x.detach() for x in inputs(6))
    want = torch.autograd.grad(model(*given).square().sum(), list(model.parameters()))
    for part in ("q_proj", "k_proj", "v_proj"):
        frozen = copy.deepcopy(model)
        for name, p in frozen.named_parameters():
            p.requires_grad_(part not in name)
        program = torch.export.export(frozen, given).module()
        parameters = [p.requires_grad_() for _, p in sorted(program.named_parameters())]
        found = torch.autograd.grad(program(*given).square().sum(), parameters)
        names = [name for name, _ in model.named_parameters()]
        wanted = dict(zip(names, want, strict=True))
        for (name, _), got in zip(sorted(program.named_parameters()), found, strict=True):
            assert torch.allclose(got, wanted[name], rtol=1e-9, atol=1e-12), (part, name)


def test_layout_without_a_gradient_refuses_it_in_a_program() -> None:
    q, k, v = arrays()
    layout = Layout.agree(q, k, v, gradients="kv")
    run, _ = compiled(lambda q, k, v: cross_attention(q, k, v, layout=layout))
    with pytest.raises(ValueError, match="q: expected no tensor that requires a gradient"):
        run(q, k, v)


def test_record_holds_a_layout_of_many_ranks() -> None:
    q, k, v = arrays()
    layout = Layout.agree(q, k, v, mask=torch.zeros(6, S_KV))
    assert Layout.of_record(layout.to_record()) == layout
    longer = layout.with_queries([7])
    assert longer.record is not None
    assert Layout.of_record(longer.record) == longer
    P, long = 1000, 10**12
    large = replace(
        layout, rank=P - 1, order=tuple(range(P)), hosts=("h" * 255,) * P, s_q=(long,) * P,
        s_kv=(long,) * P, masks=(((long,) * 4, "float64"),) * P, rules=(False,) * P, forward=2**62,
    )  # fmt: skip
    record = large.to_record()
    assert record.shape == (record_nbytes(P),)
    assert Layout.of_record(record) == large


def test_eager_does_not_import_the_compiler() -> None:
    """It takes seconds."""
    program = """
import sys, torch
from lvxattn.torch_impl import cross_attention
q = torch.ones(1, 2, 3, 4, requires_grad=True)
cross_attention(q, q, q).sum().backward()
print([name for name in ("torch._dynamo", "lvxattn.torch_impl.operators") if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=250,
        env=environment(), check=True,
    )  # fmt: skip
    assert json.loads(ended.stdout.replace("'", '"')) == []
