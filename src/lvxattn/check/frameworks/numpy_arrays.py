"""NumPy: no autograd, bfloat16 from ml_dtypes."""

from typing import Any

import numpy as np

from lvxattn.check.frameworks import Array, Framework, half_missing


class NumPy(Framework):
    """NumPy's arrays."""

    name = "numpy"
    autograd = False
    device = "cpu"
    usual = ("float64", "float32")

    def __init__(self, device: str | int | None = None) -> None:
        if device not in (None, "cpu"):
            raise ValueError(f"device: expected cpu with numpy, got {device!r:.40}")
        self.missing = half_missing()

    def put(self, x: Array, memory: str = "contiguous") -> Array:
        """Copy an array, the only kind that can be read-only."""
        copy: Array = super().put(x, memory)
        if memory == "read-only":
            copy.flags.writeable = False
        return copy

    def _dense(self, x: Array) -> Array:
        return np.array(x, order="C", copy=True)

    def _repeat(self, x: Array, shape: tuple[int, ...]) -> Array:
        strides = [0 if axis == 1 else stride for axis, stride in enumerate(x.strides)]
        return np.lib.stride_tricks.as_strided(x, shape, strides)  # unlike broadcast_to, writeable

    def get(self, x: Array) -> Array:
        """Copy an array into float64."""
        return np.array(x, bool if x.dtype == bool else np.float64)

    def owns(self, x: Any) -> bool:
        """Whether x is a NumPy array."""
        return isinstance(x, np.ndarray)
