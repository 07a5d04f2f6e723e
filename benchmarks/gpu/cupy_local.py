"""mpi_impl's attention to a rank's own keys, in CuPy arrays, against PyTorch's own, in fp16.

`block_attention` takes what kernel it thinks best.  Rehearsed with NumPy arrays.
"""

from collections.abc import Iterator
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from local import BACKENDS, Inputs, attempt, shapes, theirs
from timing import Device
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from lvxattn import mpi_impl
from lvxattn.mpi_impl.block_attention import block_attention_backward


def measure(device: Device) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape and direction: seconds by kernel, and by PyTorch's backends."""
    for H, H_KV, s_q, s_kv, D in shapes(device):
        dtype = torch.float16
        moved = 2 * D * (2 * H * s_q + 2 * H_KV * s_kv)
        inputs = [
            Inputs.of(device, dtype, H, H_KV, s_q, s_kv, D) for _ in range(device.sets(moved))
        ]
        for backward in (False, True):
            kernels: dict[str, float] = {}
            peaks: dict[str, int] = {}
            failed: dict[str, str] = {}
            for name, options in ways():
                works = [partial(one_pass(x, backward), **options) for x in inputs]
                attempt(name, device, works, kernels, peaks, failed)
            torch_s: dict[str, float] = {}
            for name, backend in BACKENDS.items():
                if name == "math":
                    continue
                with sdpa_kernel(backend):
                    work = [partial(theirs, x, backward) for x in inputs]
                    attempt(f"sdpa {name}", device, work, torch_s, {}, failed, prepare=True)
            yield {
                "dtype": "float16", "H": H, "H_KV": H_KV, "s_q": s_q, "s_kv": s_kv, "D": D,
                "pass": "backward" if backward else "forward",
                "flop": (10 if backward else 4) * H * s_q * s_kv * D,
                "bytes": 2 * moved if backward else moved,
                "seconds": kernels, "sdpa seconds": torch_s, "auto": "auto", "failed": failed,
                "off by": off(inputs[0]),
            }  # fmt: skip


def ways() -> list[tuple[str, dict[str, Any]]]:
    """Return the ways to call `block_attention`: as it is and, if it can be told, plainly."""
    found: list[tuple[str, dict[str, Any]]] = [("auto", {})]
    if "kernel" in signature(mpi_impl.block_attention).parameters:
        found.append(("blocked", {"kernel": "blocked"}))
    return found


def one_pass(x: Inputs, backward: bool) -> Any:
    """Return a call on the same memory as PyTorch's."""
    q, k, v, dout, lse, delta = map(array, (x.q, x.k, x.v, x.dout, x.lse, x.delta))
    if not backward:
        return partial(mpi_impl.block_attention, q, k, v, scale=x.scale)
    dk, dv = (array(torch.zeros_like(t, dtype=torch.float32)) for t in (x.k, x.v))
    given = dout, q, k, v, lse, delta, dk, dv
    return partial(block_attention_backward, *given, scale=x.scale)


def off(x: Inputs) -> float:
    """Return by how much out differs from torch_impl's at most: a wrong result is not fast."""
    out, _ = mpi_impl.block_attention(*map(array, (x.q, x.k, x.v)), scale=x.scale)
    return float(abs(out - array(x.out)).max())


def array(x: Tensor) -> Any:
    """Return a tensor's memory as a CuPy array or, on the CPU, a NumPy array."""
    if not x.is_cuda:
        return np.asarray(x.detach())
    import cupy

    return cupy.from_dlpack(x.detach())
