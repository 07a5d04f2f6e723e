"""PyTorch: autograd; its bfloat16 goes through 16-bit integers, which NumPy knows."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from lvxattn.check.frameworks.framework import (
    DTYPES,
    Array,
    Function,
    Pullback,
    half_missing,
    same_over_heads,
    there,
)
from lvxattn.common.masks import MaskRule


class Torch:
    """PyTorch's tensors on one device."""

    name = "torch"
    autograd = True
    usual = ("float32", "bfloat16")

    def __init__(self, device: str | int | None = None) -> None:
        try:
            # "cuda" is the current device of this thread; its tensors say which that is.
            one = torch.zeros(1, device="cpu" if device is None else device)
            one.cpu()  # the device "meta" has no numbers
        except (RuntimeError, AssertionError, TypeError) as error:
            why = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"device: expected one that PyTorch has, such as cpu or cuda:0, got {device!r:.40}:"
                f" {why:.200}"
            ) from None
        self._device = one.device
        self.device = str(self._device)
        self.missing = half_missing()
        self.dtypes = there(DTYPES, self.missing)

    def active(self) -> AbstractContextManager[Any]:
        """Make a CUDA device the thread's own, for kernels that are launched on that.

        What is compiled is compiled anew for every case: after a few shapes a compiled function
        would run as it is written, and that would be checked instead.
        """
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def put(self, x: Array, memory: str = "contiguous") -> torch.Tensor:
        """Copy an array; a tensor cannot be read-only."""
        if memory == "transposed" and x.ndim == 4:
            return self._dense(x.swapaxes(-1, -2)).transpose(-1, -2)
        if memory == "broadcast" and same_over_heads(x):
            return self._dense(x[:, :1]).expand(x.shape)
        return self._dense(x)

    def _dense(self, x: Array) -> torch.Tensor:
        x = np.array(x, order="C", copy=True)
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(x).to(self._device)

    def rule(self, mask: MaskRule) -> MaskRule:
        """Return the mask itself."""
        return mask

    def get(self, x: torch.Tensor) -> Array:
        """Copy a tensor into float64."""
        x = x.detach().cpu()
        return np.array((x if x.dtype == torch.bool else x.double()).numpy())

    def owns(self, x: Any) -> bool:
        """Whether x is a tensor on the device."""
        return isinstance(x, torch.Tensor) and x.device == self._device

    def differentiate(self, fn: Function, q: Any, k: Any, v: Any) -> tuple[Any, Pullback | str]:
        """Call the function on leaves that require gradients.

        They share memory with q, k and v, so that what is written into them shows there.
        """
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            result = fn(*leaves)
        out = result[0] if isinstance(result, tuple | list) and result else result
        if not isinstance(out, torch.Tensor):
            return result, "out is no tensor"
        if not out.requires_grad:
            return result, "out does not require grad"

        def pullback(dout: Any) -> tuple[Any, Any, Any]:
            found = torch.autograd.grad(out, leaves, dout, allow_unused=True)
            # What out does not depend on has no gradient instead of one of 0.
            dq, dk, dv = (
                torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
            )
            return dq, dk, dv

        return result, pullback
