"""One rank's attention to its own keys, by every kernel that can, against PyTorch's own.

At the sizes a rank has in the paper: 32 query heads and 8 key-value heads of 128.  The best of
`F.scaled_dot_product_attention`'s backends, each forced in turn, counts as PyTorch's.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from timing import Device
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl import block_attention, block_attention_backward
from lvxattn.torch_impl.kernels import KERNELS, KernelSpec, split
from lvxattn.torch_impl.kernels.choose import choose

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What may do the work of a part, where a forward's keys are split by ourselves.
SPLIT_WITHIN = {"cuda": ("cuda_flash", "cudnn", "efficient"), "cpu": ("cpu_flash", "blocked")}
# How many shares of work a device may need to be busy, and how many rows make one.
BUSY, ROWS = (132, 264, 528), 128
# The backend that keeps all scores is left out above this many bytes of them.
MOST_SCORES = 2**32

Work = Callable[[], Any]


def shapes(device: Device) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield H, H_KV, s_q, s_kv, D."""
    if device.tiny:
        yield from ((4, 2, 8, 1100, 16), (4, 2, 40, 1100, 16))
        return
    for s_kv in (75_000, 300_000):
        for s_q in (64, 128, 512, 2048):
            yield 32, 8, s_q, s_kv, 128


def measure(device: Device, dtype: torch.dtype = torch.bfloat16) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape and direction: seconds by kernel and by PyTorch's backend."""
    for H, H_KV, s_q, s_kv, D in shapes(device):
        element = dtype.itemsize
        moved = element * D * (2 * H * s_q + 2 * H_KV * s_kv)
        inputs = [
            Inputs.of(device, dtype, H, H_KV, s_q, s_kv, D) for _ in range(device.sets(moved))
        ]
        for backward in (False, True):
            mine = inputs[0]
            job = KernelSpec.of(mine.q, mine.k, mine.v, MaskView(None), backward=backward)
            kernels, peaks, failed = {}, {}, {}
            for name, work in ours(job):
                attempt(name, device, [partial(work, x) for x in inputs], kernels, peaks, failed)
            torch_s: dict[str, float] = {}
            for name, backend in BACKENDS.items():
                if name == "math" and H * s_q * s_kv * element > MOST_SCORES:
                    continue
                with sdpa_kernel(backend):
                    works = [partial(theirs, x, backward) for x in inputs]
                    attempt(f"sdpa {name}", device, works, torch_s, peaks, failed, prepare=True)
            row = {
                **work_of(inputs[0], backward),
                "seconds": kernels, "sdpa seconds": torch_s, "peak bytes": peaks,
                "auto": choose(job), "failed": failed,
            }  # fmt: skip
            if "auto" in kernels:
                found = one_pass(backward, "auto", mine)
                row["off by"] = farthest(found if backward else found[:1], mine)
            yield row


class Inputs:
    """What one call works on."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        self.q, self.k, self.v, self.dout = q, k, v, dout
        self.scale = q.shape[3] ** -0.5
        self.out, self.lse = block_attention(q, k, v, scale=self.scale)
        self.delta = (dout * self.out).sum(dim=-1)

    @staticmethod
    def of(
        device: Device, dtype: torch.dtype, H: int, H_KV: int, s_q: int, s_kv: int, D: int
    ) -> "Inputs":
        """Return random ones."""
        q, dout = (device.randn(1, H, s_q, D, dtype=dtype) for _ in range(2))
        k, v = (device.randn(1, H_KV, s_kv, D, dtype=dtype) for _ in range(2))
        return Inputs(q, k, v, dout)


def work_of(x: Inputs, backward: bool) -> dict[str, Any]:
    """Return what a pass works on, in operations and in bytes that it must read and write."""
    (_, H, s_q, D), (_, H_KV, s_kv, _) = x.q.shape, x.k.shape
    moved = x.q.dtype.itemsize * D * (2 * H * s_q + 2 * H_KV * s_kv)
    return {
        "dtype": str(x.q.dtype).removeprefix("torch."),
        "H": H, "H_KV": H_KV, "s_q": s_q, "s_kv": s_kv, "D": D,
        "pass": "backward" if backward else "forward",
        "flop": (10 if backward else 4) * H * s_q * s_kv * D,
        "bytes": 2 * moved if backward else moved,
    }  # fmt: skip


def ours(job: KernelSpec) -> Iterator[tuple[str, Callable[[Inputs], object]]]:
    """Yield the ways in which torch_impl can do a job: kernels, `auto`, and splits of its keys."""
    for name in ("auto", *KERNELS):
        if name == "split" or (name != "auto" and KERNELS[name].unsupported(job) is not None):
            continue
        yield name, partial(one_pass, job.backward, name)
    if job.backward:  # shared out by keys as it is
        return
    shares = job.H_KV * -(-job.H // job.H_KV * job.s_q // ROWS)  # heads of a group are folded
    for inner in SPLIT_WITHIN[job.device]:
        if KERNELS[inner].unsupported(job) is not None:
            continue
        counts = sorted({-(-busy // shares) for busy in BUSY} - {1})
        for parts in counts if job.device == "cuda" else counts[:1]:
            yield f"split {inner} {parts}", partial(one_split, inner, parts)


def one_pass(backward: bool, kernel: str, x: Inputs) -> tuple[Tensor, ...]:
    """Do one pass by a kernel; gradients of keys in their dtype, as PyTorch's are."""
    if backward:
        given = x.dout, x.q, x.k, x.v, x.lse, x.delta
        return block_attention_backward(*given, scale=x.scale, kernel=kernel, dtype=x.k.dtype)
    return block_attention(x.q, x.k, x.v, scale=x.scale, kernel=kernel)


def one_split(inner: str, parts: int, x: Inputs) -> object:
    """Do a forward with the keys in parts, each done by a kernel, whatever the split would do."""
    with (
        mock.patch.object(split, "WITHIN", (KERNELS[inner],)),
        mock.patch.object(split, "parts_for", lambda _: parts),  # noqa: PT008, a mock takes time
    ):
        return one_pass(False, "split", x)


def theirs(x: Inputs, backward: bool) -> Work:
    """Return PyTorch's pass; before its backward, its forward is done."""
    sdpa = partial(
        torch.nn.functional.scaled_dot_product_attention,
        scale=x.scale,
        enable_gqa=x.q.shape[1] != x.k.shape[1],
    )
    if backward:
        given = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        out = sdpa(*given)
        return partial(torch.autograd.grad, out, given, x.dout, retain_graph=True)
    return partial(torch.no_grad()(sdpa), x.q, x.k, x.v)


def farthest(found: Sequence[Tensor], x: Inputs) -> float:
    """Return how far the farthest row of out, or of dq, dk and dv, is from PyTorch's own.

    In norms of that row, or of the mean one if that is larger.  A wrong result is not fast.
    """
    backward = len(found) > 1
    wanted = theirs(x, backward)()
    off = []
    for one, other in zip(found, wanted if backward else (wanted,), strict=True):
        norm = other.float().norm(dim=-1)
        norm = norm.clamp(min=norm.square().mean().sqrt())
        off.append(((one.float() - other.float()).norm(dim=-1) / norm).max())
    return float(torch.stack(off).max())


def attempt(
    name: str,
    device: Device,
    works: list[Callable[[], Any]],
    seconds: dict[str, float],
    peaks: dict[str, int],
    failed: dict[str, str],
    *,
    prepare: bool = False,
) -> None:
    """Measure, or write down why that was not possible: one kernel's failure is not another's.

    With `prepare` the works return what is to be timed.
    """
    try:
        if prepare:
            works = [work() for work in works]
        seconds[name] = device.seconds(works)
        peaks[name] = device.peak(works[0])
    except Exception as error:  # CuPy's have nothing but that in common
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]


def rules(rows: list[dict[str, Any]]) -> list[str]:
    """Return what was the fastest of torch_impl's, as lines to write `kernels/choose.py` by."""
    lines = []
    for row in rows:
        named = {name: s for name, s in row["seconds"].items() if name != "auto"}
        if not named:
            continue
        order = sorted(named, key=named.__getitem__)
        next_ = f", then {order[1]} {named[order[1]] * 1e3:.3g} ms" if order[1:] else ""
        lines.append(
            f"{row['pass']:8} {row['dtype']} H {row['H']}/{row['H_KV']} s_q {row['s_q']:5} "
            f"s_kv {row['s_kv']:7}: {order[0]} {named[order[0]] * 1e3:.3g} ms{next_}; "
            f"auto took {row['auto']}"
        )
    return lines
