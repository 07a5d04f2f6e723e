"""CuPy: no autograd, a current device for each thread, bfloat16 since version 14.

Kernels run asynchronously: a copy to the host waits for the current stream, and for no other.
"""

from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np

from lvxattn.check.frameworks import Array, Framework, half_missing
from lvxattn.cli.tensors import dtype_of


class CuPy(Framework):
    """CuPy's arrays on one device."""

    name = "cupy"
    autograd = False

    def __init__(self, device: str | int | None = None) -> None:
        self._number = _device_number(device)
        try:
            with self.active():
                cupy.asarray(np.zeros(1)) + 1
        except Exception as error:  # CuPy's error classes are those of its CUDA bindings
            raise ValueError(
                f"device: expected a CUDA device that CuPy can use, got {device!r:.40}: "
                f"{type(error).__name__}: {error!s:.200}"
            ) from None
        self.device = f"cuda:{self._number}"
        self.missing = half_missing() or self._without_half()

    def _without_half(self) -> dict[str, str]:
        """Return why bfloat16 is unavailable: an older CuPy, or a compiler without it."""
        try:
            with self.active():
                one = cupy.asarray(np.ones(1, dtype_of("bfloat16")))
                cupy.asnumpy(one + one)
        except Exception as error:
            return {"bfloat16": f"CuPy {cupy.__version__}: {type(error).__name__}: {error!s:.100}"}
        return {}

    def active(self) -> AbstractContextManager[Any]:
        """Make the device the thread's own."""
        device: AbstractContextManager[Any] = cupy.cuda.Device(self._number)
        return device

    def _dense(self, x: Array) -> Any:
        return cupy.asarray(np.array(x, order="C", copy=True))

    def _repeat(self, x: Any, shape: tuple[int, ...]) -> Any:
        return cupy.broadcast_to(x, shape)

    def get(self, x: Any) -> Array:
        """Copy an array into float64."""
        host = cupy.asnumpy(x)
        return np.array(host, bool if host.dtype == bool else np.float64)

    def owns(self, x: Any) -> bool:
        """Whether x is an array on the device."""
        return isinstance(x, cupy.ndarray) and x.device.id == self._number


def _device_number(device: str | int | None) -> int:
    """Return the number of a CUDA device: of ``1``, ``"1"``, ``"cuda:1"``; by default 0."""
    text = "0" if device in (None, "cuda", "gpu") else str(device)
    number = text.removeprefix("cuda:").removeprefix("gpu:")
    if not number.isdecimal():
        raise ValueError(f"device: expected a number or cuda:NUMBER with cupy, got {device!r:.40}")
    return int(number)
