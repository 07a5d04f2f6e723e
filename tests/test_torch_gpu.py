"""torch_impl on a CUDA device: kernels, a pass and a step, where there is one."""

from dataclasses import replace

import pytest
import torch

from lvxattn.torch_impl import (
    CrossAttention,
    Layout,
    block_attention,
    block_attention_backward,
    cross_attention,
)
from lvxattn.torch_impl.kernels import KERNELS
from tests.backends import tensor
from tests.cases import BF16, CASES, Case
from tests.judge import worst_ratios

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
def test_a_step_waits_for_the_device_nowhere(recompute: bool) -> None:
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


def test_decoding_asks_the_driver_for_no_memory_after_the_first_step() -> None:
    k, v = (torch.randn(1, 8, 65536, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    layout = Layout.agree(q, k, v)
    with torch.inference_mode():
        cross_attention(q, k, v, layout=layout)
        before = torch.cuda.memory_stats()["num_device_alloc"]
        for _ in range(5):
            cross_attention(q, k, v, layout=layout)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
