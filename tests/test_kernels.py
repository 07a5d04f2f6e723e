"""The kernels of torch_impl's block attention: pitfalls, the surrogate out, and the choice."""

import sys
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl import block_attention, block_attention_backward
from lvxattn.torch_impl.block_attention import partial_attention
from lvxattn.torch_impl.kernels import (
    KERNELS,
    KernelSpec,
    cpu_flash,
    cuda_flash,
    cudnn,
    efficient,
    split,
)
from lvxattn.torch_impl.kernels.choose import RULES, choose
from lvxattn.torch_impl.kernels.fused import surrogate_out
from lvxattn.torch_impl.merge import lse_of, merge_partials
from tests import fake_fused
from tests.backends import tensor
from tests.cases import Case, Problem
from tests.judge import ratio, worst_ratios
from tests.tolerances import UNIT, limits

HERE = pytest.mark.parametrize("kernel", ["blocked", "cpu_flash", "split"])
FUSED = {
    "cuda_flash": (cuda_flash, fake_fused.flash, fake_fused.flash_backward),
    "cudnn": (cudnn, fake_fused.cudnn, fake_fused.cudnn_backward),
    "efficient": (efficient, fake_fused.efficient, fake_fused.efficient_backward),
}


def solve(problem: Problem, kernel: Any, parts: int = 1, dtype: str = "float32") -> dict[str, Any]:
    """Return all results, the keys taken in parts; `kernel` is a name, or a module unchecked."""
    q, k, v, dout = (tensor(x) for x in (problem.q, problem.k, problem.v, problem.dout))
    wide = getattr(torch, dtype)
    dlse, view = tensor(problem.dlse).to(wide), MaskView.of(problem.mask)
    if isinstance(problem.mask, np.ndarray):
        view = MaskView(tensor(problem.mask))
    forward, backward, options = partial_attention, block_attention_backward, {"kernel": kernel}
    if not isinstance(kernel, str):
        forward, backward, options = kernel.forward, kernel.backward, {}
    cuts = [k.shape[2] * i // parts for i in range(parts + 1)]
    options |= {"scale": problem.scale}
    top = torch.full(dout.shape[:3], -torch.inf, dtype=wide)
    result = torch.zeros(dout.shape, dtype=wide), top, torch.zeros_like(top)
    for a, b in pairwise(cuts):
        part = forward(q, k[:, :, a:b], v[:, :, a:b], mask=view.from_key(a), **options)
        result = merge_partials(*result, *part)
    out, lse = result[0], lse_of(*result[1:])
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (q, k, v))
    delta = (dout.to(wide) * out).sum(dim=-1) - dlse
    for a, b in pairwise(cuts):
        dq_part, dk[:, :, a:b], dv[:, :, a:b] = backward(
            dout, q, k[:, :, a:b], v[:, :, a:b], lse, delta, mask=view.from_key(a), **options
        )
        dq += dq_part
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {name: x.numpy() for name, x in results.items()}


def job(device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> KernelSpec:
    sizes = {"B": 1, "H": 8, "H_KV": 2, "s_q": 1024, "s_kv": 65536, "D": 64, "D_V": 64}
    return KernelSpec(device, dtype, **(sizes | changes))


# What CPU flash does otherwise than one would think.


def test_cpu_flash_takes_bool_masks() -> None:
    problem = Case("bool", B=2, H=4, H_KV=2, mask="full", dtype="float32").make()
    q, k, v, mask = (tensor(x) for x in (problem.q, problem.k, problem.v, problem.mask))
    with pytest.raises(RuntimeError, match="mask"):
        cpu_flash._forward(q, k, v, 0.0, False, attn_mask=mask)
    assert max(worst_ratios(problem, solve(problem, "cpu_flash")).values()) <= 1


@pytest.mark.parametrize("kernel", ["blocked", "cpu_flash"])
def test_fp64_takes_an_fp32_mask(kernel: str) -> None:
    problem = Case("fp32 mask", mask="additive").make()
    narrow = problem.mask.astype(np.float32)
    problem = Problem(**(vars(problem) | {"mask": narrow}))
    assert max(worst_ratios(problem, solve(problem, kernel, dtype="float64")).values()) <= 1


@pytest.mark.parametrize("kernel", ["blocked", "cpu_flash"])
@pytest.mark.parametrize("mask", ["dead rows", "all dead"])
def test_dead_rows_give_zero(mask: str, kernel: str) -> None:
    problem = Case("dead", B=2, H=4, H_KV=2, mask=mask, dtype="float32").make()
    found = solve(problem, kernel)
    dead = ~np.broadcast_to(problem.mask, (2, 4, 31, 97)).any(axis=-1)
    assert dead.any()
    assert (found["lse"][dead] == -np.inf).all()
    assert not found["out"][dead].any()
    assert not found["dq"][dead].any()
    if mask == "all dead":
        assert not found["dk"].any()
        assert not found["dv"].any()


@pytest.mark.parametrize("mask", ["none", "full", "padding", "dead rows", "all dead", "additive"])
@pytest.mark.parametrize("keys", [16, 96])
def test_cpu_flash_takes_keys_in_tiles(
    mask: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_flash, "KEYS", keys)
    monkeypatch.setattr(cpu_flash, "LEAST_PAIRS", 0)
    lengths: list[int] = []

    def spy(function: Any, index: int) -> Any:
        return lambda *args, **options: (
            lengths.append(args[index].shape[2]) or function(*args, **options)
        )

    monkeypatch.setattr(cpu_flash, "_forward", spy(cpu_flash._forward, 1))
    monkeypatch.setattr(cpu_flash, "_backward", spy(cpu_flash._backward, 2))
    problem = Case("tiles", B=2, H=4, H_KV=2, mask=mask, dtype="float32").make()
    assert max(worst_ratios(problem, solve(problem, "cpu_flash")).values()) <= 1
    assert max(lengths) == keys
    assert sum(lengths) == 2 * 97


@HERE
@pytest.mark.parametrize("queries", [5, 0])
def test_gradients_are_added_in_place(queries: int, kernel: str) -> None:
    rng = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, 4, queries, 8, generator=rng) for _ in range(2))
    k, v = (torch.randn(2, 2, 700, 8, generator=rng) for _ in range(2))
    lse, delta = torch.full((2, 4, queries), 7.0), torch.ones(2, 4, queries)
    given: Any = (dout, q, k, v, lse, delta)
    dq, dk, dv = block_attention_backward(*given, scale=0.3, kernel=kernel)
    whole = torch.randn(2, 2, 2, 800, 8, generator=rng)
    sums, before = whole[:, :, :, 50:750].unbind(), whole.clone()
    found = block_attention_backward(*given, *sums, scale=0.3, kernel=kernel)
    assert torch.equal(found[0], dq)
    assert all(x is y for x, y in zip(found[1:], sums, strict=True))
    before[:, :, :, 50:750] += torch.stack([dk, dv])
    assert torch.allclose(whole, before, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[:, :, :, :50], before[:, :, :, :50])
    assert torch.equal(whole[:, :, :, 750:], before[:, :, :, 750:])


@HERE
@pytest.mark.parametrize("empty", ["S_Q", "S_KV"])
def test_empty_queries_or_keys(empty: str, kernel: str) -> None:
    problem = Case("empty", **{empty: 0}, dtype="float32").make()
    assert max(worst_ratios(problem, solve(problem, kernel)).values()) <= 1


def test_wide_values_go_to_a_supporting_kernel() -> None:
    q, k, v = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 9)
    with pytest.raises(ValueError, match="kernel: expected for cpu_flash D_V = D = 8, got D_V = 9"):
        block_attention(q, k, v, scale=1.0, kernel="cpu_flash")
    assert block_attention(q, k, v, scale=1.0)[0].shape == (1, 2, 3, 9)


@HERE
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_stays_in_its_row_or_head(which: str, kernel: str) -> None:
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 7, 8, generator=rng)
    k, v = (torch.randn(2, 2, 1100, 8, generator=rng) for _ in range(2))
    given = {"q": q, "k": k, "v": v}
    given[which][1, 1, 3, 2] = torch.nan
    out, lse = block_attention(**given, scale=0.3, kernel=kernel)
    touched = torch.zeros(2, 4, 7, dtype=torch.bool)
    touched[1, 1, 3] = which == "q"
    touched[1, 2:] = which != "q"  # the query heads of key-value head 1
    assert torch.equal(out.isnan().any(dim=-1), touched)
    assert torch.equal(lse.isnan(), touched if which != "v" else torch.zeros_like(touched))


@HERE
def test_views_are_not_copied(kernel: str) -> None:
    problem = Case("strided", B=2, H=4, H_KV=2, S_KV=40, dtype="float32").make()
    sizes = [problem.k.nbytes, problem.v.nbytes]
    block = torch.empty(sum(sizes) + 16, dtype=torch.uint8)
    k, v = (
        x.view(torch.float32).view(2, 2, 40, 8) for x in (block[16 : -sizes[1]], block[-sizes[1] :])
    )
    long = torch.full((2, 2, 60, 8), torch.nan)
    k.copy_(tensor(problem.k))
    long[:, :, :40] = tensor(problem.v)
    v = long[:, :, :40]
    out, lse = block_attention(tensor(problem.q), k, v, scale=problem.scale, kernel=kernel)
    results = {"out": out.numpy(), "lse": lse.numpy()}
    assert max(worst_ratios(problem, results).values()) <= 1


# CUDA's kernels, emulated with their conventions.


@pytest.fixture
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    kernel, forward, backward = FUSED[request.param]
    monkeypatch.setattr(kernel, "_forward", forward)
    monkeypatch.setattr(kernel, "_backward", backward)
    return kernel


@pytest.mark.parametrize(
    ("fused", "mask"),
    [
        ("cuda_flash", "none"),
        *product(
            ("cudnn", "efficient"),
            ("none", "full", "over heads", "padding", "dead rows", "all dead", "additive"),
        ),
    ],
    indirect=["fused"],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_fused_kernels_match_operator_signatures(fused: Any, mask: str, parts: int) -> None:
    # lse padded to 32 (efficient), (B, H, s_q, 1) (cuDNN), grouped heads, aligned additive bias.
    problem = Case("fused", B=2, H=4, H_KV=2, mask=mask, dtype="float32").make()
    assert max(worst_ratios(problem, solve(problem, fused, parts)).values()) <= 1


@pytest.mark.parametrize("fused", ["cuda_flash"], indirect=True)
def test_flash_lse_of_no_keys_is_minus_infinity(fused: Any) -> None:
    q, k = torch.ones(1, 2, 3, 8), torch.zeros(1, 2, 0, 8)
    out, lse, _ = fused.forward(q, k, k, scale=1.0, mask=MaskView(None))
    assert (lse == -torch.inf).all()
    assert not out.any()


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_operators_accept_the_arguments(name: str, dtype: torch.dtype) -> None:
    # On the meta device: PyTorch checks arguments and shapes, and computes nothing.
    kernel, none = KERNELS[name], MaskView(None)
    q = torch.empty(2, 4, 7, 8, dtype=dtype, device="meta")
    k = torch.empty(2, 2, 100, 8, dtype=dtype, device="meta")
    rows = torch.empty(2, 4, 7, device="meta")
    out, lse, _ = kernel.forward(q, k, k, scale=0.3, mask=none)
    grads = kernel.backward(q, q, k, k, rows, rows, scale=0.3, mask=none)
    assert (out.shape, lse.shape) == (q.shape, rows.shape)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert {x.dtype for x in (out, lse, grads[0])} == {torch.float32}
    assert {x.dtype for x in grads[1:]} == {dtype}  # as they come: not widened for nothing


@pytest.mark.parametrize("name", ["cuda_flash", "cudnn"])
def test_16_bit_kernels_refuse_old_devices(name: str) -> None:
    half = {"dtype": torch.float16, "device": "cuda"}
    assert KERNELS[name].unsupported(job(**half)) is None
    wrong = KERNELS[name].unsupported(job(**half, capability=(7, 5)))
    assert wrong == "a device of compute capability 8.0 or more, got (7, 5)"


@pytest.mark.parametrize(
    ("shape", "rows"), [((1, 1, 5, 33), 4 * 5), ((1, 1, 1, 33), 1), ((2, 8, 5, 33), 2 * 8 * 5)]
)
def test_aligned_bias_is_no_larger_than_its_mask(shape: tuple[int, ...], rows: int) -> None:
    q, k, bias = torch.empty(2, 8, 5, 4), torch.empty(2, 2, 33, 4), torch.randn(shape)
    aligned = KERNELS["efficient"]._aligned(bias, q, k)  # type: ignore[attr-defined]
    assert torch.equal(aligned.reshape(2, 8, 5, 33), bias.expand(2, 8, 5, 33))
    assert aligned.untyped_storage().nbytes() == rows * 48 * 4


# Split over keys.


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_split_takes_any_number_of_keys(
    dtype: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "parts_for", lambda job: parts)
    problem = Case("split", B=2, H=4, H_KV=2, S_Q=3, dtype=dtype).make()
    wide = "float64" if dtype == "float64" else "float32"
    assert max(worst_ratios(problem, solve(problem, "split", 2, wide)).values()) <= 1


def test_split_uses_idle_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert split.parts_for(job(H=1, H_KV=1, s_q=1)) == 16
    assert split.parts_for(job(H=8, H_KV=1, s_q=1, backward=True)) == 16
    assert split.parts_for(job(H=8, H_KV=1, s_q=1)) == 2
    assert split.parts_for(job(s_q=1024)) == 1
    assert split.parts_for(job(H=1, H_KV=1, s_q=1, s_kv=1030)) == 2
    assert split.parts_for(job("cuda", torch.float32, s_q=16)) == 64  # 4 heads of 16 rows a tile
    assert split.parts_for(job("cuda", torch.float32, s_q=16, H=2)) == 64
    assert split.parts_for(job("cuda", torch.float32, s_q=16, backward=True)) == 1


def test_split_parts_are_merged() -> None:
    parts = torch.randn(5, 2, 3, 4), 10 * torch.randn(5, 2, 3), 9 * torch.rand(5, 2, 3)
    for dead in ((slice(None), 0, 0), (1, 1, 1)):
        for x, value in zip(parts, (0, -torch.inf, 0), strict=True):
            x[dead] = value
    out, lse = (result := split._joined(*parts))[0], lse_of(*result[1:])
    joined = tuple(x[:1] for x in parts)
    for part in range(1, 5):
        joined = merge_partials(*joined, *(x[part : part + 1] for x in parts))
    want = joined[0], lse_of(*joined[1:])
    assert torch.equal(lse == -torch.inf, want[1] == -torch.inf)
    assert bool((out[0, 0, 0] == 0).all())
    # Five parts: as many roundings of weights and sums, lse of 40 at most.
    u = UNIT["float32"]
    assert torch.allclose(lse, want[1], rtol=0, atol=5 * (2 * 40 + 8) * u)
    assert torch.allclose(
        out, want[0], rtol=0, atol=5 * (2 * 40 + 8) * u * float(parts[0].abs().max())
    )


# The stand-in for out.


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("level", [0.0, 1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_surrogate_out_has_given_row_sums(level: float, size: float, dtype: str) -> None:
    kind = getattr(torch, dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32
    rng = torch.Generator().manual_seed(0)
    dout = (torch.randn(1, 2, 50, 8, generator=rng, dtype=torch.float64) * size).to(kind)
    delta = (torch.randn(1, 2, 50, generator=rng, dtype=torch.float64) * level).to(wide)
    given, out = surrogate_out(dout, delta, kind)
    assert given.dtype == out.dtype == kind
    assert out.isfinite().all()
    sums = (given.double() * out.double()).sum(dim=-1)
    # Rounding of the quotient, and of out* in bf16; what |dout| times the least number loses.
    off = 16 * UNIT["float32" if dtype == "bfloat16" else dtype] + 2 * UNIT[dtype]
    least = 2.0**-126 * (1 + 8 * dout.double().abs().amax(dim=-1))
    assert ((sums - delta).abs() <= off * delta.abs() + least).all()
    moved = (given.double() - dout.double()).abs().sum(dim=-1)
    assert (moved <= 2.0**-96 * delta.abs() + 2.0**-120).all()


def test_surrogate_out_keeps_nan_in_its_row() -> None:
    dout, delta = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3)
    dout[0, 0, 0, 1], delta[0, 0, 2] = torch.nan, torch.nan
    given, out = surrogate_out(dout, delta, torch.float32)
    assert (given * out).sum(dim=-1).isnan().tolist() == [[[True, False, True]]]
    assert torch.equal(given, dout) or given[0, 0, 0].isnan().any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e15])
@pytest.mark.parametrize("level", [1.0, 1e15])
def test_dlse_reaches_gradients_through_flash(level: float, size: float, dtype: str) -> None:
    made = Case("lse", B=2, H=4, H_KV=2, dtype=dtype).make()
    dout = (made.dout * size).astype(dtype)
    dout[:, :, 1::2] = 0
    problem = Problem(**(vars(made) | {"dout": dout, "dlse": made.dlse * level}))
    truth, found = problem.truth(), solve(problem, "cpu_flash", 2, dtype)
    limit = limits(problem.case, truth, dtype, dtype)
    # dv by dout' - dout: 2^-98 |delta| times at most one probability a row.
    limit["dv"] = limit["dv"] + 2.0**-98 * 62 * (abs(problem.dlse).max() + 1e3 * size)
    assert abs(truth.results["dq"]).max() > 0.1
    for name in ("dq", "dk", "dv"):
        assert ratio(found[name].astype(np.float64), truth.results[name], limit[name]) <= 1, name


# Half precision.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_error_does_not_grow_with_shards(
    dtype: str,
) -> None:
    problem = Case("half", H=4, H_KV=2, S_Q=64, S_KV=4096, D=32, D_V=32, dtype=dtype).make()
    truth = problem.truth().results
    kind = getattr(torch, dtype)
    errors: dict[str, list[float]] = {name: [] for name in ("out", "dq", "dk", "dv")}
    for parts in (1, 4, 64):
        found = solve(problem, "auto", parts)
        for name, measured in errors.items():
            rounded = torch.from_numpy(found[name]).to(kind).double().numpy()
            floor = torch.from_numpy(truth[name]).to(kind).double().numpy() - truth[name]
            error = np.sqrt(((rounded - truth[name]) ** 2).mean() / (floor**2).mean())
            measured.append(float(error))
    for name, measured in errors.items():
        assert max(measured) <= 2, (name, measured)
        assert max(measured) <= 1.25 * min(measured), (name, measured)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("parts", [1, 4])
def test_half_precision_scores_are_not_rounded(dtype: str, parts: int) -> None:
    problem = Case("large scores", S_KV=257, D=64, D_V=64, score=30.0, dtype=dtype).make()
    found, truth = solve(problem, "blocked", parts), problem.truth()
    limit = limits(problem.case, truth, dtype, "float32")["lse"]
    assert ratio(found["lse"].astype(np.float64), truth.results["lse"], limit) <= 1


# The choice.


@pytest.mark.parametrize(
    ("asked", "kernel"),
    [
        (job(), "cpu_flash"),
        (job(backward=True), "cpu_flash"),
        (job(dtype=torch.float64), "cpu_flash"),
        (job(mask="padding", mask_dtype=torch.bool), "cpu_flash"),
        (job(mask="array", mask_dtype=torch.float64), "cpu_flash"),
        (job(mask="callable"), "blocked"),
        (job(D_V=32), "blocked"),
        (job(backward=True, wanted="q"), "blocked"),
        (job(backward=True, wanted="kv"), "cpu_flash"),
        (job(s_q=1, s_kv=8192, H=8, H_KV=2), "blocked"),
        (job(s_q=1, s_kv=8192, H=8, H_KV=8), "cpu_flash"),
        (job(s_q=1, s_kv=1024, H=8, H_KV=2), "cpu_flash"),
        (job(s_q=5, s_kv=8192, H=8, H_KV=2), "cpu_flash"),
        (job(s_q=1, s_kv=8192, H=8, H_KV=2, backward=True), "cpu_flash"),
        (
            job(s_q=1, s_kv=8192, H=8, H_KV=2, mask="padding", mask_dtype=torch.bool),
            "cpu_flash",
        ),
        (job(dtype=torch.bfloat16), "blocked"),
        (job(dtype=torch.float16), "blocked"),
        (job("cuda", torch.bfloat16), "cuda_flash"),
        (job("cuda", torch.bfloat16, s_q=16), "cuda_flash"),
        (job("cuda", torch.bfloat16, s_q=16, D_V=128), "split"),
        (job("cuda", torch.float32, s_q=16), "split"),
        (job("cuda", torch.float32, s_q=16, backward=True), "efficient"),
        (job("cuda", torch.float16, backward=True, H=256, H_KV=128), "blocked"),
        (job("cuda", torch.bfloat16, mask="array", mask_dtype=torch.bool, s_q=4096), "cudnn"),
        (job("cuda", torch.bfloat16, mask="array", mask_dtype=torch.bool, H_KV=8), "efficient"),
        (job("cuda", torch.bfloat16, mask="array", mask_dtype=torch.float32), "blocked"),
        (job("cuda", torch.float32, mask="padding", mask_dtype=torch.bool), "efficient"),
        (job("cuda", torch.float32, mask="padding", mask_dtype=torch.float32), "blocked"),
        (
            job("cuda", mask="padding", mask_dtype=torch.float32, backward=True),
            "efficient",
        ),
        (job("cuda", torch.bfloat16, mask="callable"), "blocked"),
        (job("cuda", torch.float64), "blocked"),
        (job("xpu", torch.bfloat16), "blocked"),
    ],
    ids=str,
)
def test_auto_chooses_kernel(asked: KernelSpec, kernel: str) -> None:
    assert choose(asked) == kernel


@HERE
@pytest.mark.parametrize("wanted", ["q", "kv", ""])
def test_only_wanted_gradients(kernel: str, wanted: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, H, s, 8) for H, s in ((4, 7), (2, 40), (2, 40)))
    given = torch.randn(q.shape), q, k, v, torch.randn(q.shape[:3]) + 4, torch.randn(q.shape[:3])
    every = block_attention_backward(*given, scale=0.3, kernel=kernel)
    sums = [torch.ones_like(k), torch.ones_like(v)]
    for more in ([], sums):
        found = block_attention_backward(*given, *more, scale=0.3, kernel=kernel, wanted=wanted)
        assert found[0].shape == q.shape
        if "q" in wanted:
            torch.testing.assert_close(found[0], every[0])
        else:
            assert not found[0].any()
        for got, want in zip(found[1:], every[1:], strict=True):
            if "k" in wanted:
                torch.testing.assert_close(got, want + 1 if more else want)
            else:
                assert got.shape[2] == 0
    assert all((x == 1).all() for x in sums) is ("k" not in wanted)


def test_blocked_skips_tiles_that_a_rule_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    from lvxattn.torch_impl.kernels import blocked

    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 4096, 8, dtype=torch.float64) for _ in range(4))
    products: list[int] = []
    product = blocked.Tiles.product
    monkeypatch.setattr(
        blocked.Tiles, "product", lambda *args: products.append(1) or product(*args)
    )

    def solve(mask: Any) -> tuple[int, int, list[torch.Tensor]]:
        products.clear()
        out, top, total = partial_attention(q, k, v, scale=0.3, mask=mask, kernel="blocked")
        forward = len(products)
        lse, delta = lse_of(top, total), (dout * out).sum(-1)
        grads = block_attention_backward(
            dout, q, k, v, lse, delta, scale=0.3, mask=mask, kernel="blocked"
        )
        return forward, len(products) - forward, [out, lse, *grads]

    causal = solve(lambda b, h, i, j: j <= i)
    # What an additive mask hides is computed: it may hide by a finite number.
    whole = solve(torch.full((4096, 4096), -torch.inf, dtype=torch.float64).triu(1))
    for n in (0, 1):
        assert 0.5 * whole[n] <= causal[n] < 0.7 * whole[n]
    for mine, other in zip(causal[2], whole[2], strict=True):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


def test_auto_rules_name_kernel_and_reason() -> None:
    assert {rule.kernel for rule in RULES} <= set(KERNELS)
    assert all(rule.because for rule in RULES)
    assert RULES[-1].kernel == "blocked"  # which can do every job


def test_unknown_or_unsupported_kernel_raises() -> None:
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"kernel: expected auto, blocked, .*, got 'flash'"):
        block_attention(q, q, q, scale=1.0, kernel="flash")
    with pytest.raises(ValueError, match="kernel: expected for cudnn a cuda tensor, got cpu"):
        block_attention(q, q, q, scale=1.0, kernel="cudnn")
    rows = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="kernel: expected for split no mask"):
        block_attention_backward(
            q, q, q, q, rows, rows, scale=1.0, kernel="split", mask=torch.ones(3)
        )


def test_every_file_of_kernels_is_registered() -> None:
    package = sys.modules["lvxattn.torch_impl.kernels"]
    modules = {x.NAME for x in vars(package).values() if hasattr(x, "NAME")}
    assert modules == set(KERNELS)
    assert all(KERNELS[name].__name__.endswith(f".{name}") for name in modules)  # type: ignore[attr-defined]
