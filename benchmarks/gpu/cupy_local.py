"""mpi_impl's attention to a rank's own keys, in CuPy arrays, against PyTorch's own, in bf16.

`auto` takes the kernel in CUDA C++ where there is a device; `tiles` are matrix products.  What
nvidia-cudnn-frontend could do instead is cuDNN's own kernel, which PyTorch calls, too: `sdpa cudnn`
beside it says which measures better.  Rehearsed with NumPy arrays.
"""

from collections.abc import Iterator
from functools import partial
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
        dtype = narrow(device)
        moved = 2 * D * (2 * H * s_q + 2 * H_KV * s_kv)
        inputs = [
            Inputs.of(device, dtype, H, H_KV, s_q, s_kv, D) for _ in range(device.sets(moved))
        ]
        for backward in (False, True):
            kernels: dict[str, float] = {}
            peaks: dict[str, int] = {}
            failed: dict[str, str] = {}
            for name in ("auto", "tiles"):
                works = [partial(one_pass(x, backward), kernel=name) for x in inputs]
                attempt(name, device, works, kernels, peaks, failed)
            torch_s: dict[str, float] = {}
            for name, backend in BACKENDS.items():
                if name == "math":
                    continue
                with sdpa_kernel(backend):
                    work = [partial(theirs, x, backward) for x in inputs]
                    attempt(f"sdpa {name}", device, work, torch_s, {}, failed, prepare=True)
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "H": H, "H_KV": H_KV, "s_q": s_q, "s_kv": s_kv, "D": D,
                "pass": "backward" if backward else "forward",
                "flop": (10 if backward else 4) * H * s_q * s_kv * D,
                "bytes": 2 * moved if backward else moved,
                "seconds": kernels, "sdpa seconds": torch_s, "auto": "auto", "failed": failed,
                "off by": off(inputs[0]),
            }  # fmt: skip


def narrow(device: Device) -> torch.dtype:
    """Return bf16 or, where arrays know nothing of it, fp16: both take the same time."""
    try:
        array(device.randn(1)).astype(np.float32)
    except Exception:  # whatever CuPy says of a dtype that it does not know
        return torch.float16
    return torch.bfloat16


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
    x = x.detach()
    if x.dtype == torch.bfloat16:  # which DLPack does not hand to every CuPy
        import ml_dtypes

        return array(x.view(torch.int16)).view(ml_dtypes.bfloat16)
    if not x.is_cuda:
        return np.asarray(x)
    import cupy

    return cupy.from_dlpack(x)
