"""The properties of a block that decide which kernels support it, and which one is used.

A `KernelSpec` holds no tensor, so that the rules for a device can be tested on a machine without
one.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.common.validation import accumulator


@dataclass(frozen=True)
class KernelSpec:
    """The device, dtype, kind of mask and sizes of a block, and whether it is a backward.

    Attributes
    ----------
    device : str
        ``"cpu"``, ``"cuda"``, ...
    mask : str
        ``"none"``, ``"callable"``, ``"padding"`` (an array with one row for all queries) or
        ``"array"`` (any other).
    mask_dtype : torch.dtype, optional
        Of an array mask.
    capability : (int, int)
        The compute capability of a CUDA device; bf16 requires (8, 0).
    wanted : str
        The arguments whose gradients a backward computes.
    """

    device: str
    dtype: torch.dtype
    B: int
    H: int
    H_KV: int
    s_q: int
    s_kv: int
    D: int
    D_V: int
    mask: str = "none"
    mask_dtype: torch.dtype | None = None
    backward: bool = False
    capability: tuple[int, int] = (9, 0)
    wanted: str = "qkv"

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, mask: MaskView, *, backward: bool, wanted: str = "qkv"
    ) -> "KernelSpec":
        """Return the spec of these arguments."""
        B, H, s_q, D = q.shape
        H_KV, s_kv = k.shape[1:3]
        kind, dtype = "none", None
        if callable(mask.mask):
            kind = "callable"
        elif mask.mask is not None:
            shape = mask.mask.shape
            kind = "array" if len(shape) > 1 and shape[-2] != 1 else "padding"
            dtype = mask.mask.dtype
        spec = KernelSpec(
            q.device.type, q.dtype, B, H, H_KV, s_q, s_kv, D, v.shape[3], kind, dtype, backward,
            wanted=wanted,
        )  # fmt: skip
        if q.is_cuda:
            spec = replace(spec, capability=torch.cuda.get_device_capability(q.device))
        return spec

    def on(self, device: str, *dtypes: torch.dtype) -> str | None:
        """Return None for this device and one of these dtypes, else what is expected."""
        if self.device != device:
            return f"a {device} tensor, got {self.device}"
        if self.dtype not in dtypes:
            return f"one of {', '.join(_name(d) for d in dtypes)}, got {_name(self.dtype)}"
        return None

    @property
    def additive(self) -> bool:
        """Whether a mask can hide keys by a finite number, which makes |lse| large."""
        return self.mask in ("padding", "array") and self.mask_dtype != torch.bool

    def since_ampere(self) -> str | None:
        """Return None if the device supports the kernels for 16 bits, else what is expected."""
        if self.capability < (8, 0):
            return f"a device of compute capability 8.0 or more, got {self.capability}"
        return None

    def exact_bias(self) -> str | None:
        """Return None if the mask is exact as a bias in q's dtype, else what is expected."""
        if self.mask == "callable":
            return "no mask or an array, got a callable mask"
        wide = accumulator(_name(self.dtype)) == _name(self.dtype)
        if not wide and self.mask_dtype not in (None, torch.bool, self.dtype):
            return f"an additive mask that {_name(self.dtype)} holds, got {_name(self.mask_dtype)}"
        return None

    def room_for_surrogate_out(self) -> str | None:
        """Return None if the dtype has room for a surrogate out, else what is expected."""
        if self.backward and self.dtype == torch.float16:
            return "bfloat16, float32 or float64 in the backward, got float16"
        return None


class Kernel(Protocol):
    """The functions of a kernel's module.

    Arguments are those of `partial_attention` and `block_attention_backward`, with at least one
    query and one key, and supported by the kernel.
    """

    NAME: str

    def unsupported(self, spec: KernelSpec) -> str | None:
        """Return None, or ``"<what is expected>, got <what is given>"``."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return out, top and total in the accumulator dtype."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        sums: "Sums" = None,
        *,
        scale: float,
        mask: MaskView,
        wanted: str = "qkv",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq in the accumulator dtype, and dk and dv in it or, rounded, in k's.

        If `sums` of dk and dv are given, add to them in place, and return them instead.  What is
        not wanted need not be computed: what is returned for it is not read.
        """


# dk and dv in the accumulator dtype, to be added to.
Sums = tuple[Tensor, Tensor] | None


def added(sums: Sums, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums, after adding dk and dv in place; without sums, return dk and dv."""
    if sums is None:
        return dk, dv
    for total, x in zip(sums, (dk, dv), strict=True):
        total += x
    return sums


def accumulator_of(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums of x are taken: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
