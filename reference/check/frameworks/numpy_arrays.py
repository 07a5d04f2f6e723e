"""NumPy: no autograd, bfloat16 from ml_dtypes."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from lvxattn.reference.check.frameworks.framework import Array, laid_out


class NumPy:
    """NumPy's arrays."""

    name = "numpy"
    usual = ("float64", "float32")

    def __init__(self, device: str = "cpu") -> None:
        if device != "cpu":
            raise ValueError(f"device: expected cpu with numpy, got {device!r}")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """bfloat16 only where ml_dtypes is."""
        half = ("float16", "bfloat16") if find_spec("ml_dtypes") else ("float16",)
        return ("float64", "float32", *half)

    def put(self, x: Array, memory: str = "contiguous") -> Array:
        """Copy an array."""
        return laid_out(x, memory)

    def get(self, x: Array) -> Array:
        """Copy an array into float64."""
        return x.copy() if x.dtype == bool else x.astype(np.float64)

    def owns(self, x: Any) -> bool:
        """Whether x is a NumPy array."""
        return isinstance(x, np.ndarray)

    def differentiate(
        self,
        fn: Callable[[Any, Any, Any], Any],
        q: Any,
        k: Any,
        v: Any,
        dout: Any,  # noqa: ARG002
    ) -> tuple[Any, None]:
        """Call the function; there is no autograd."""
        return fn(q, k, v), None
