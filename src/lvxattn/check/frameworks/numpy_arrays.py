"""NumPy: no autograd, bfloat16 from ml_dtypes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from lvxattn.check.frameworks.framework import (
    DTYPES,
    Array,
    Function,
    half_missing,
    laid_out,
    there,
)
from lvxattn.common.masks import MaskRule


class NumPy:
    """NumPy's arrays."""

    name = "numpy"
    autograd = False
    device = "cpu"
    usual = ("float64", "float32")

    def __init__(self, device: str | int | None = None) -> None:
        if device not in (None, "cpu"):
            raise ValueError(f"device: expected cpu with numpy, got {device!r:.40}")
        self.missing = half_missing()
        self.dtypes = there(DTYPES, self.missing)

    def active(self) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()

    def put(self, x: Array, memory: str = "contiguous") -> Array:
        """Copy an array."""
        return laid_out(x, memory)

    def rule(self, mask: MaskRule) -> MaskRule:
        """Return the mask itself."""
        return mask

    def get(self, x: Array) -> Array:
        """Copy an array into float64."""
        return np.array(x, bool if x.dtype == bool else np.float64)

    def owns(self, x: Any) -> bool:
        """Whether x is a NumPy array."""
        return isinstance(x, np.ndarray)

    def differentiate(self, fn: Function, q: Any, k: Any, v: Any) -> tuple[Any, str]:
        """Call the function; there is no autograd."""
        return fn(q, k, v), "NumPy has no autograd, and the function no backward"
