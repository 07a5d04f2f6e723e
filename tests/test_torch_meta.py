"""The operators that torch_impl calls on a CUDA device, seen without one, on meta tensors.

A tensor on PyTorch's device "meta" has a shape and a dtype.  Operators check their arguments, those
for CUDA too, and whatever a program would have to wait for a device to learn, a number, a truth or
the length of a list of indices, cannot be had.  Nor may anything be made of Python's numbers, which
would be copied to the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvxattn.torch_impl import CrossAttention, Layout, block_attention, cross_attention
from lvxattn.torch_impl import autograd as autograd_module
from lvxattn.torch_impl.cross_attention import SCHEDULE_FUNCTIONS
from lvxattn.torch_impl.kernels import cuda_flash
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec
from tests.cases import options_of
from tests.torch_ranks import torch_report

FLASH = "aten._scaled_dot_product_flash_attention"
EFFICIENT = "aten._scaled_dot_product_efficient_attention"


class Caught(TorchDispatchMode):
    """Records which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).rpartition(".")[0])
        return func(*args, **(kwargs or {}))


class Held(TorchDispatchMode):
    """Records the peak memory of the results of operators, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.held = {key: x for key, x in self.held.items() if not x[0].expired()}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.held.values()))
        return found


@contextmanager
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Caught]:
    """Choose kernels as on CUDA, for meta tensors."""
    of = KernelSpec.of
    monkeypatch.setattr(
        KernelSpec, "of", staticmethod(lambda *x, **y: replace(of(*x, **y), device="cuda"))
    )
    monkeypatch.setattr(autograd_module, "exactly", lambda _: nullcontext())
    for name in ("tensor", "as_tensor", "asarray", "from_numpy"):
        monkeypatch.setattr(torch, name, partial(copied, getattr(torch, name)))
    with Caught() as caught:
        yield caught


def copied(make: Callable[..., Any], *values: Any, device: Any = None, **options: Any) -> Any:
    if device == "cpu":  # and stays there
        return make(*values, device=device, **options)
    raise AssertionError("what is made of Python's numbers has to be copied to the device")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def rule(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
    return kv_index % 3 != q_index % 2


MASKS: dict[str, Callable[[torch.dtype], Any]] = {
    "no mask": lambda _: None,
    "padding": lambda _: empty(1, 1, 1, 4096, dtype=torch.bool),
    "additive": lambda dtype: empty(1, 1, 64, 4096, dtype=dtype),
    "callable": lambda _: rule,
}
# By dtype, what `auto` has to come to without a mask: forward, and backward.
OPERATORS = {
    torch.bfloat16: (FLASH, f"{FLASH}_backward"),
    torch.float16: (FLASH, "aten.bmm"),
    torch.float32: (EFFICIENT, f"{EFFICIENT}_backward"),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULE_FUNCTIONS)
@pytest.mark.parametrize("dtype", OPERATORS)
def test_cuda_step_reads_no_value_of_the_device(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, schedule: str, kind: str
) -> None:
    how = options_of(schedule, 1)
    with cuda(monkeypatch) as caught:
        q, k, v = (empty(1, H, s, 64, dtype=dtype) for H, s in ((4, 64), (2, 4096), (2, 4096)))
        given = [x.requires_grad_() for x in (q, k, v)]
        mask = MASKS[kind](dtype)
        layout = Layout.agree(q, k, v, mask=mask, **how)
        call = {name: x for name, x in how.items() if name not in ("schedule", "grid")}
        out, lse = cross_attention(*given, mask=mask, layout=layout, return_lse=True, **call)
        douts = [torch.empty_like(out), torch.empty_like(lse)]
        grads = torch.autograd.grad([out, lse], given, douts)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in given]
    assert (out.dtype, out.shape) == (dtype, q.shape)
    assert (lse.dtype, lse.shape) == (torch.float32, q.shape[:3])
    if kind == "no mask":
        assert set(OPERATORS[dtype]) <= caught.names


def test_memory_of_a_million_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with cuda(monkeypatch), Held() as held:
        q, dout = (empty(1, 32, 512, 128) for _ in range(2))
        k, v = (empty(1, 8, 1_000_000, 128) for _ in range(2))
        given = [x.requires_grad_() for x in (q, k, v)]
        out = cross_attention(*given)
        grads = torch.autograd.grad(out, given, dout)
    wanted = sum(x.nbytes for x in (*given, dout, out, *grads))
    assert wanted <= held.peak <= 1.05 * wanted


def test_misaligned_rows_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A misaligned read ends a CUDA context, and with it the process.
    q, straight = empty(1, 4, 64, 64), empty(1, 2, 600, 64)
    views = empty(1, 2, 600, 67)[..., :64], empty(1, 2, 600, 72)[..., 1:65], empty(2, 600, 72)
    given: list[torch.Tensor] = []

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        given.extend([k, v])
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    monkeypatch.setattr(cuda_flash, "_forward", forward)
    with cuda(monkeypatch):
        for k in (*views[:2], views[2][None, ..., 8:]):
            block_attention(q, k, straight, scale=0.125, kernel="cuda_flash")
    assert [x.stride(2) for x in given[::2]] == [64, 64, 72]  # the third is well placed
    assert [x.data_ptr() for x in given[::2]] == [0, 0, 16]
    assert all(x.stride(2) == 64 for x in given[1::2])


@pytest.mark.parametrize("recompute", [True, False])
def test_cuda_step_of_module_reads_no_value_of_the_device(
    monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    with cuda(monkeypatch):
        module = CrossAttention(64, 4, recompute_kv=recompute, device="meta", dtype=torch.bfloat16)
        module(empty(1, 16, 64), empty(1, 600, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.parametrize(
    ("kernel", "dtype", "operator"),
    [
        ("cuda_flash", torch.bfloat16, FLASH),
        ("cudnn", torch.float16, "aten._scaled_dot_product_cudnn_attention"),
        ("efficient", torch.float32, EFFICIENT),
        ("split", torch.float32, EFFICIENT),
    ],
)
def test_kernels_call_their_operator(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, operator: str
) -> None:
    with cuda(monkeypatch) as caught:
        q, k = empty(1, 4, 64, 64, dtype=dtype), empty(1, 2, 4099, 64, dtype=dtype)
        out, lse = block_attention(q, k, k, scale=0.125, kernel=kernel)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, torch.float32, q.shape[:3])
    assert operator in caught.names


@pytest.mark.parametrize("leak", ["number", "truth", "indices", "to the device", "from it"])
def test_synchronisation_is_detected(monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    leaks: dict[str, Callable[[torch.Tensor], object]] = {
        "number": lambda x: x.sum().item(),
        "truth": lambda x: bool((x > 0).any()),
        "indices": lambda x: x[x > 0],
        "to the device": lambda x: x + torch.tensor([1.0], device="meta"),
        "from it": lambda x: x.cpu(),
    }
    with cuda(monkeypatch), pytest.raises((AssertionError, RuntimeError)):  # the second for meta
        leaks[leak](empty(4))


@pytest.mark.mpi
def test_gpu_program_runs_on_cpu() -> None:
    for right in torch_report(2, "torch_gpu.py", "gloo", "cpu")["ranks"]:
        assert right
        assert all(right.values()), right


@pytest.mark.parametrize("recompute", [True, False])
def test_fake_tensors_give_shapes(recompute: bool) -> None:
    with FakeTensorMode():
        module = CrossAttention(64, 4, recompute_kv=recompute)
        out = module(torch.empty(1, 16, 64), torch.empty(1, 600, 64))
        out.sum().backward()
    assert out.shape == (1, 16, 64)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())
