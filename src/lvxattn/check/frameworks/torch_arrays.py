"""PyTorch: autograd; its bfloat16 goes through 16-bit integers, which NumPy knows."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from lvxattn.check.frameworks import Array, Framework, Function, Pullback, half_missing


class Torch(Framework):
    """PyTorch's tensors on one device."""

    name = "torch"
    autograd = True
    preload = "torch"

    def __init__(self, device: str | int | None = None) -> None:
        try:
            # "cuda" is the current device of this thread; its tensors show its number.
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

    def active(self) -> AbstractContextManager[Any]:
        """Make a CUDA device the thread's own, for kernels launched on the current device.

        Compiled functions are recompiled for every case: after a few shapes, PyTorch would run them
        uncompiled, and that would be checked instead.
        """
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _dense(self, x: Array) -> torch.Tensor:
        x = np.array(x, order="C", copy=True)
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(x).to(self._device)

    def _repeat(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return x.expand(shape)

    def get(self, x: torch.Tensor) -> Array:
        """Copy a tensor into float64."""
        x = x.detach().cpu()
        return np.array((x if x.dtype == torch.bool else x.double()).numpy())

    def owns(self, x: Any) -> bool:
        """Whether x is a tensor on the device."""
        return isinstance(x, torch.Tensor) and x.device == self._device

    def differentiate(self, fn: Function, q: Any, k: Any, v: Any) -> tuple[Any, Pullback | str]:
        """Call the function on leaves that require gradients.

        They share memory with q, k and v, so that writes into them show there.
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
            # An input that out does not depend on has no gradient instead of zeros.
            dq, dk, dv = (
                torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
            )
            return dq, dk, dv

        return result, pullback
