"""torch_impl on a CUDA device: kernels, a pass and a step, where there is one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lvxattn.torch_impl import (
    CrossAttention,
    Layout,
    block_attention,
    block_attention_backward,
    cross_attention,
)
from lvxattn.torch_impl.cross_attention import SCHEDULE_FUNCTIONS
from lvxattn.torch_impl.kernels import KERNELS
from tests.backends import tensor
from tests.cases import BF16, CASES, Case
from tests.judge import worst_ratios
from tests.torch_ranks import all_right

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALF = [
    replace(case, name=f"{case.name}, {dtype}", dtype=dtype, D=64, D_V=64)
    for case in (Case("plain"), Case("grouped", B=2, H=4, H_KV=2), Case("1100 keys", S_KV=1100))
    for dtype in ("bfloat16", "float16", "float32")
]


def solve(case: Case, kernel: str) -> dict[str, float]:
    """Return the errors over their limits of one block on the device."""
    problem = case.make()
    q, k, v, dout = (tensor(x).cuda() for x in (problem.q, problem.k, problem.v, problem.dout))
    mask = problem.mask
    mask = mask if mask is None or callable(mask) else tensor(mask).cuda()
    options = {"scale": problem.scale, "mask": mask, "kernel": kernel}
    out, lse = block_attention(q, k, v, **options)
    delta = (dout.to(lse.dtype) * out).sum(dim=-1) - tensor(problem.dlse).cuda().to(lse.dtype)
    dq, dk, dv = block_attention_backward(dout, q, k, v, lse, delta, **options)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return worst_ratios(problem, {name: x.cpu().numpy() for name, x in found.items()})


@pytest.mark.parametrize("kernel", ["auto", "blocked"])
@pytest.mark.parametrize("case", CASES + BF16 + HALF, ids=lambda case: case.name)
def test_every_case_on_the_device(case: Case, kernel: str) -> None:
    assert max(solve(case, kernel).values()) <= 1


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"blocked", "cpu_flash"}))
@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_every_kernel_on_the_device(case: Case, kernel: str) -> None:
    try:
        ratios = solve(case, kernel)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    assert max(ratios.values()) <= 1


@pytest.mark.parametrize("recompute", [True, False])
def test_step_never_synchronises_the_device(recompute: bool) -> None:
    module = CrossAttention(256, 4, recompute_kv=recompute, device="cuda", dtype=torch.bfloat16)
    x, y = (torch.randn(1, s, 256, device="cuda", dtype=torch.bfloat16) for s in (64, 4096))
    q, kv = x.new_empty(1, 4, 64, 64), x.new_empty(1, 4, 4096, 64)
    layout = Layout.agree(q, kv, kv)
    module(x, y, layout=layout).sum().backward()  # what is done once may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x, y, layout=layout).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_decoding_allocates_nothing_after_first_step() -> None:
    k, v = (torch.randn(1, 8, 65536, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    layout = Layout.agree(q, k, v)
    with torch.inference_mode():
        cross_attention(q, k, v, layout=layout)
        before = torch.cuda.memory_stats()["num_device_alloc"]
        for _ in range(5):
            cross_attention(q, k, v, layout=layout)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def passes(**options: Any) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """Return inputs on the device, and a forward and a backward on them by a layout."""
    q, k, v = (
        torch.randn(1, heads, s, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads, s in ((4, 64), (2, 4096), (2, 4096))
    )
    layout = Layout.agree(q, k, v, **options)
    dout = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    given = {name: x for name, x in options.items() if name in ("mask", "queries")}

    def step() -> list[torch.Tensor]:
        out = cross_attention(q, k, v, layout=layout, **given)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    return [q, k, v, dout], step


def rule(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
    return kv_index % 3 != q_index % 2


@pytest.mark.parametrize("kind", ["no mask", "padding", "additive", "callable"])
@pytest.mark.parametrize("schedule", SCHEDULE_FUNCTIONS)
def test_pass_never_synchronises_the_device(schedule: str, kind: str) -> None:
    masks = {
        "no mask": None,
        "padding": (torch.arange(4096, device="cuda") < 3000)[None, None, None],
        "additive": torch.randn(1, 1, 64, 4096, device="cuda", dtype=torch.bfloat16),
        "callable": rule,
    }
    how = {"queries": schedule} if schedule == "replicated" else {"schedule": schedule}
    _, step = passes(mask=masks[kind], **how)
    step()  # what is done once may wait
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_step_is_captured_in_a_cuda_graph() -> None:
    inputs, step = passes()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture wants what is done once to have been done aside
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    # Sums of a gradient may be taken in another order, and are rounded to bf16 once.
    for got, want in zip(replayed, step(), strict=True):
        largest = float(want.abs().max())
        assert torch.allclose(got.float(), want.float(), rtol=2**-6, atol=2**-6 * largest)


@pytest.mark.mpi
@pytest.mark.parametrize("P", [1, 2, 4])
def test_ranks_sharing_a_gpu_over_gloo(P: int) -> None:
    all_right(P, "gloo", "cuda")


@pytest.mark.mpi
@pytest.mark.parametrize("P", [2, 4])
def test_ranks_with_a_gpu_each_over_nccl(P: int) -> None:
    if torch.cuda.device_count() < P:
        pytest.skip(f"needs {P} GPUs, has {torch.cuda.device_count()}: NCCL takes one rank a GPU")
    all_right(P, "nccl", "cuda")
