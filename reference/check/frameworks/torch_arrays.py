"""PyTorch: autograd; its bfloat16 goes through 16-bit integers, which NumPy knows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lvxattn.reference.check.frameworks.framework import Array, laid_out


class Torch:
    """PyTorch's tensors on one device."""

    name = "torch"
    dtypes = ("float64", "float32", "float16", "bfloat16")
    usual = ("float32", "bfloat16")

    def __init__(self, device: str = "cpu") -> None:
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {device!r} is not there: {error}") from None

    def put(self, x: Array, memory: str = "contiguous") -> torch.Tensor:
        """Copy an array; a tensor cannot be read-only."""
        x = laid_out(x, "contiguous" if memory == "read-only" else memory)
        if memory == "broadcast" and x.ndim == 4 and x.strides[1] == 0:
            return self._dense(x[:, :1]).expand(x.shape)
        if memory == "transposed" and x.ndim == 4:
            return self._dense(x.swapaxes(-1, -2)).transpose(-1, -2)
        return self._dense(x)

    def _dense(self, x: Array) -> torch.Tensor:
        x = np.ascontiguousarray(x)
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(x).to(self.device)

    def get(self, x: torch.Tensor) -> Array:
        """Copy a tensor into float64."""
        x = x.detach().cpu()
        copy: Array = (x.clone() if x.dtype == torch.bool else x.double()).numpy().copy()
        return copy

    def owns(self, x: Any) -> bool:
        """Whether x is a tensor on the device."""
        return isinstance(x, torch.Tensor) and x.device.type == self.device.type

    def differentiate(
        self, fn: Callable[[Any, Any, Any], Any], q: Any, k: Any, v: Any, dout: Any
    ) -> tuple[Any, tuple[Any, Any, Any] | None]:
        """Call the function and go back through what it did."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            result = fn(*leaves)
            out = result[0] if isinstance(result, tuple | list) else result
            if not isinstance(out, torch.Tensor) or not out.requires_grad:
                return result, None
            gradients = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        zeros = (
            torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)
        )
        dq, dk, dv = zeros
        return result, (dq, dk, dv)
