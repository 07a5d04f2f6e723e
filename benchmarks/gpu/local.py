"""One rank's attention to its own keys, by every kernel that supports it, against PyTorch's.

At the sizes of a rank in the paper: 32 query heads and 8 key-value heads of 128.  The best of
`F.scaled_dot_product_attention`'s backends, each forced in turn, counts as PyTorch's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
# Kernels for the parts of a forward whose keys are split.
SPLIT_WITHIN = {"cuda": ("cuda_flash", "cudnn", "efficient"), "cpu": ("cpu_flash", "blocked")}
# Numbers of shares of work that may occupy a device, and the number of rows of a share.
BUSY, ROWS = (132, 264, 528), 128
# Maximum bytes of scores for the backend that stores them all.
MOST_SCORES = 2**32

Work = Callable[[], Any]
Prepare = Callable[["Inputs"], Work]
Ways = Callable[["Inputs", bool], Iterator[tuple[str, Prepare]]]


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
    for x, backward, times in compare(device, dtype, ours, BACKENDS):
        row = {
            **work_of(x, backward),
            "seconds": times.ours, "sdpa seconds": times.theirs, "peak bytes": times.peaks,
            "auto": choose(spec_of(x, backward)), "failed": times.failed,
        }  # fmt: skip
        if "auto" in times.ours:
            found = one_pass(backward, "auto", x)()
            row["off by"] = farthest(found if backward else found[:1], x)
        yield row


@dataclass
class Times:
    """Seconds and peaks of memory by kernel, ours and PyTorch's, and the failures."""

    ours: dict[str, float] = field(default_factory=dict)
    theirs: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def compare(
    device: Device, dtype: torch.dtype, ways: Ways, backends: dict[str, SDPBackend]
) -> Iterator[tuple["Inputs", bool, Times]]:
    """Measure kernels against PyTorch's backends on all shapes, forward and backward.

    Parameters
    ----------
    device : Device
    dtype : torch.dtype
    ways : callable
        Yields, for inputs and a direction, kernels by name, as functions from inputs to the work.
    backends : dict
        PyTorch's backends by name.
    """
    for H, H_KV, s_q, s_kv, D in shapes(device):
        moved = dtype.itemsize * D * (2 * H * s_q + 2 * H_KV * s_kv)
        inputs = [
            Inputs.of(device, dtype, H, H_KV, s_q, s_kv, D) for _ in range(device.sets(moved))
        ]
        for backward in (False, True):
            times = Times()
            for name, prepare in ways(inputs[0], backward):
                attempt(name, device, prepare, inputs, times.ours, times)
            for name, backend in backends.items():
                if name == "math" and H * s_q * s_kv * dtype.itemsize > MOST_SCORES:
                    continue
                with sdpa_kernel(backend):
                    prepare = partial(theirs, backward)
                    attempt(f"sdpa {name}", device, prepare, inputs, times.theirs, times)
            yield inputs[0], backward, times


class Inputs:
    """The tensors of one call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        self.q, self.k, self.v, self.dout = q, k, v, dout
        self.scale = q.shape[3] ** -0.5
        self.out, self.lse = block_attention(q, k, v, scale=self.scale)
        self.delta = (dout * self.out).sum(dim=-1)

    @staticmethod
    def of(
        device: Device, dtype: torch.dtype, H: int, H_KV: int, s_q: int, s_kv: int, D: int
    ) -> "Inputs":
        """Return random inputs."""
        q, dout = (device.randn(1, H, s_q, D, dtype=dtype) for _ in range(2))
        k, v = (device.randn(1, H_KV, s_kv, D, dtype=dtype) for _ in range(2))
        return Inputs(q, k, v, dout)


def work_of(x: Inputs, backward: bool) -> dict[str, Any]:
    """Return a pass's sizes, operations, and bytes that it must read and write."""
    (_, H, s_q, D), (_, H_KV, s_kv, _) = x.q.shape, x.k.shape
    moved = x.q.dtype.itemsize * D * (2 * H * s_q + 2 * H_KV * s_kv)
    return {
        "dtype": str(x.q.dtype).removeprefix("torch."),
        "H": H, "H_KV": H_KV, "s_q": s_q, "s_kv": s_kv, "D": D,
        "pass": "backward" if backward else "forward",
        "flop": (10 if backward else 4) * H * s_q * s_kv * D,
        "bytes": 2 * moved if backward else moved,
    }  # fmt: skip


def spec_of(x: Inputs, backward: bool) -> KernelSpec:
    """Return what kernels are chosen by."""
    return KernelSpec.of(x.q, x.k, x.v, MaskView(None), backward=backward)


def ours(x: Inputs, backward: bool) -> Iterator[tuple[str, Prepare]]:
    """Yield torch_impl's ways to do a pass: kernels, `auto`, and splits of the keys."""
    job = spec_of(x, backward)
    for name in ("auto", *KERNELS):
        if name == "split" or (name != "auto" and KERNELS[name].unsupported(job) is not None):
            continue
        yield name, partial(one_pass, backward, name)
    if backward:  # which is divided over keys anyway
        return
    shares = job.H_KV * -(-job.H // job.H_KV * job.s_q // ROWS)  # heads of a group are folded
    for inner in SPLIT_WITHIN[job.device]:
        if KERNELS[inner].unsupported(job) is not None:
            continue
        counts = sorted({-(-busy // shares) for busy in BUSY} - {1})
        for parts in counts if job.device == "cuda" else counts[:1]:
            yield f"split {inner} {parts}", partial(one_split, inner, parts)


def one_pass(backward: bool, kernel: str, x: Inputs) -> Work:
    """Return a pass by a kernel; gradients of keys are in their dtype, as PyTorch's are."""
    given = {"scale": x.scale, "kernel": kernel}
    if not backward:
        return partial(block_attention, x.q, x.k, x.v, **given)
    rest = x.dout, x.q, x.k, x.v, x.lse, x.delta
    return partial(block_attention_backward, *rest, **given, dtype=x.k.dtype)


def one_split(inner: str, parts: int, x: Inputs) -> Work:
    """Return a forward with the keys in parts, each done by a kernel."""

    def work() -> object:
        with (
            mock.patch.object(split, "WITHIN", (KERNELS[inner],)),
            mock.patch.object(split, "parts_for", lambda _: parts),  # noqa: PT008, a mock is slow
        ):
            return forward()

    forward = one_pass(False, "split", x)
    return work


def theirs(backward: bool, x: Inputs) -> Work:
    """Return PyTorch's pass; for a backward, the forward has been done."""
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
    """Return the largest distance of a row of out, or of dq, dk and dv, from PyTorch's.

    Relative to the norm of that row, or to the mean norm if that is larger.
    """
    backward = len(found) > 1
    wanted = theirs(backward, x)()
    off = []
    for one, other in zip(found, wanted if backward else (wanted,), strict=True):
        norm = other.float().norm(dim=-1)
        norm = norm.clamp(min=norm.square().mean().sqrt())
        off.append(((one.float() - other.float()).norm(dim=-1) / norm).max())
    return float(torch.stack(off).max())


def attempt(
    name: str,
    device: Device,
    prepare: Prepare,
    inputs: list[Inputs],
    seconds: dict[str, float],
    times: Times,
) -> None:
    """Measure one kernel, or record its failure, which does not affect the others."""
    try:
        works = [prepare(x) for x in inputs]
        seconds[name] = device.seconds(works)
        times.peaks[name] = device.peak(works[0])
    except Exception as error:  # CuPy's errors have no other type in common
        times.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]


def rules(rows: list[dict[str, Any]]) -> list[str]:
    """Return the fastest of torch_impl's kernels, as lines for writing `kernels/choose.py`."""
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
