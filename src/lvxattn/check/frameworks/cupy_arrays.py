"""CuPy: no autograd, a current device for each thread, bfloat16 since version 14.

Kernels run late: a copy to the host waits for the current stream, and for no other.
"""

from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np

from lvxattn.check.frameworks.framework import (
    DTYPES,
    Array,
    Function,
    device_number,
    half_missing,
    same_over_heads,
    there,
)
from lvxattn.cli.tensors import dtype_of
from lvxattn.common.masks import MaskRule


class CuPy:
    """CuPy's arrays on one device."""

    name = "cupy"
    autograd = False
    usual = ("float32", "bfloat16")

    def __init__(self, device: str | int | None = None) -> None:
        self._number = device_number(device, "cupy")
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
        self.dtypes = there(DTYPES, self.missing)

    def _without_half(self) -> dict[str, str]:
        """Return why there is no bfloat16: an older CuPy, or a compiler that cannot do it."""
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

    def put(self, x: Array, memory: str = "contiguous") -> Any:
        """Copy an array; a device array cannot be read-only."""
        if memory == "transposed" and x.ndim == 4:
            return self._dense(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        if memory == "broadcast" and same_over_heads(x):
            return cupy.broadcast_to(self._dense(x[:, :1]), x.shape)
        return self._dense(x)

    def _dense(self, x: Array) -> Any:
        return cupy.asarray(np.array(x, order="C", copy=True))

    def rule(self, mask: MaskRule) -> MaskRule:
        """Return the mask itself."""
        return mask

    def get(self, x: Any) -> Array:
        """Copy an array into float64."""
        host = cupy.asnumpy(x)
        return np.array(host, bool if host.dtype == bool else np.float64)

    def owns(self, x: Any) -> bool:
        """Whether x is an array on the device."""
        return isinstance(x, cupy.ndarray) and x.device.id == self._number

    def differentiate(self, fn: Function, q: Any, k: Any, v: Any) -> tuple[Any, str]:
        """Call the function; there is no autograd."""
        return fn(q, k, v), "CuPy has no autograd, and the function no backward"
