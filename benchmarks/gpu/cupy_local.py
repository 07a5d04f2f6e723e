"""mpi_impl's attention to a rank's own keys, in CuPy arrays, against PyTorch's, in bf16.

`auto` is the kernel in CUDA C++ on a device; `tiles` are matrix products.  nvidia-cudnn-frontend
would call cuDNN's kernel, which PyTorch calls, too: compare with `sdpa cudnn`.  Rehearsed with
NumPy arrays.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from local import BACKENDS, Inputs, Prepare, compare, farthest, work_of
from timing import Device
from torch import Tensor

from lvxattn import mpi_impl
from lvxattn.mpi_impl.block_attention import block_attention_backward


def measure(device: Device) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape and direction: seconds by kernel, and by PyTorch's backends."""
    # `auto` itself would take the tiles where the kernel does not compile.
    auto = "auto" if device.tiny else "cuda"

    def ways(_: Inputs, backward: bool) -> Iterator[tuple[str, Prepare]]:
        for name, kernel in (("auto", auto), ("tiles", "tiles")):
            yield name, partial(one_pass, backward, kernel)

    backends = {name: backend for name, backend in BACKENDS.items() if name != "math"}
    for x, backward, times in compare(device, narrow(device), ways, backends):
        row = {
            **work_of(x, backward),
            "seconds": times.ours, "sdpa seconds": times.theirs, "auto": auto,
            "failed": times.failed,
        }  # fmt: skip
        if "auto" in times.ours:
            row["off by"] = farthest(list(map(tensor, one_pass(backward, auto, x)())), x)
        yield row


def narrow(device: Device) -> torch.dtype:
    """Return bf16 or, where arrays lack it, fp16, which takes the same time."""
    try:
        array(device.randn(1)).astype(np.float32)
    except Exception:  # CuPy raises various errors for unknown dtypes
        return torch.float16
    return torch.bfloat16


def one_pass(backward: bool, kernel: str, x: Inputs) -> Callable[[], tuple[Any, ...]]:
    """Return a call for out, or for dq, dk and dv, on the same memory as PyTorch's.

    It adds to dk and dv, which are right after the first call.
    """
    q, k, v, dout, lse, delta = map(array, (x.q, x.k, x.v, x.dout, x.lse, x.delta))
    dk, dv = (array(torch.zeros_like(t)) for t in (x.k, x.v))
    given = {"scale": x.scale, "kernel": kernel}
    if not backward:
        return lambda: mpi_impl.block_attention(q, k, v, **given)[:1]
    rest = dout, q, k, v, lse, delta, dk, dv
    return lambda: (block_attention_backward(*rest, **given), dk, dv)


def tensor(x: Any) -> Tensor:
    """Return an array's memory as a tensor."""
    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(x)


def array(x: Tensor) -> Any:
    """Return a tensor's memory as a CuPy array or, on the CPU, a NumPy array."""
    x = x.detach()
    if x.dtype == torch.bfloat16:  # which not every CuPy takes by DLPack
        import ml_dtypes

        return array(x.view(torch.int16)).view(ml_dtypes.bfloat16)
    if not x.is_cuda:
        return np.asarray(x)
    import cupy

    return cupy.from_dlpack(x)
