"""Correct kernels of several kinds: if the limit is too tight, one of them exceeds it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from lvxattn.check.case_arrays import Mask, mask_array, masked, sum_groups
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.wrong.kernel_base import Array, KernelBase
from lvxattn.common.validation import accumulator


@dataclass(frozen=True)
class CorrectKernel:
    """A correct kernel.

    Attributes
    ----------
    name : str
    make : callable
        Makes a fresh kernel, which may have an attribute ``backward``.
    framework : Framework
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    framework: Framework


def correct_kernels() -> list[CorrectKernel]:
    """Return all correct kernels: PyTorch's only where it is installed."""
    numpy = framework_of("numpy")
    found = [
        CorrectKernel("naive", Naive, numpy),
        CorrectKernel("tiles of 16, a running maximum", Online, numpy),
        CorrectKernel("4 shards", KernelBase, numpy),
        CorrectKernel("64 shards", lambda: KernelBase(64), numpy),
    ]
    if find_spec("torch"):
        torch = framework_of("torch")
        found.append(CorrectKernel("PyTorch's SDPA on the CPU", lambda: _sdpa, torch))
    return found


class Naive:
    """softmax(q k^T) v with the full matrix of probabilities; only the results are rounded."""

    def __call__(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        """Return out and lse."""
        s, v = _scores(q, k, scale, mask), _repeated(v, q)
        with np.errstate(divide="ignore"):
            out, lse = self._softmax(s, v)
        return out.astype(q.dtype), lse

    def backward(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        lse: Array,  # noqa: ARG002
        *,
        scale: float,
        mask: Mask,
    ) -> tuple[Array, Array, Array]:
        """Return dq, dk and dv."""
        s, dout, out = _scores(q, k, scale, mask), _wide(dout), _wide(out)
        p = np.exp(s - _top(s))  # lse may have lost the number of keys
        total = p.sum(axis=-1, keepdims=True)
        p /= np.where(total > 0, total, 1)
        dp = dout @ _repeated(v, q).swapaxes(-1, -2)
        ds = scale * p * (dp - np.einsum("bhqd,bhqd->bhq", dout, out)[..., None])
        dq = ds @ _repeated(k, q)
        dk, dv = ds.swapaxes(-1, -2) @ _wide(q), p.swapaxes(-1, -2) @ dout
        dk, dv = (sum_groups(x, k.shape[1]) for x in (dk, dv))
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    def _softmax(self, s: Array, v: Array) -> tuple[Array, Array]:
        top = _top(s)
        p = np.exp(s - top)
        total = p.sum(axis=-1, keepdims=True)
        return p / np.where(total > 0, total, 1) @ v, (top + np.log(total))[..., 0]


class Online(Naive):
    """Online softmax over tiles of 16 keys; sums are divided at the end."""

    def _softmax(self, s: Array, v: Array) -> tuple[Array, Array]:
        out = np.zeros((*s.shape[:3], v.shape[3]), s.dtype)
        total = np.zeros((*s.shape[:3], 1), s.dtype)
        top = np.full_like(total, -np.inf)
        for start in range(0, s.shape[3], 16):
            keys = slice(start, start + 16)
            higher = np.maximum(top, s[..., keys].max(axis=-1, keepdims=True))
            base = np.where(higher == -np.inf, 0, higher).astype(s.dtype)
            p, shrink = np.exp(s[..., keys] - base), np.exp(top - base)
            total = shrink * total + p.sum(axis=-1, keepdims=True)
            out = shrink * out + p @ v[:, :, keys]
            top = higher
        return out / np.where(total > 0, total, 1), (top + np.log(total))[..., 0]


def _top(s: Array) -> Array:
    """Return the largest score of each row, 0 where all are -inf."""
    top = s.max(axis=-1, keepdims=True)
    return np.where(top == -np.inf, 0, top).astype(s.dtype)


def _scores(q: Array, k: Array, scale: float, mask: Mask) -> Array:
    s: Array = scale * (_wide(q) @ _repeated(k, q).swapaxes(-1, -2))
    array = mask_array(mask, s.shape)
    return masked(s, array if array is None or array.dtype == bool else _wide(array))


def _wide(x: Array) -> Array:
    return x.astype(accumulator(x.dtype.name))


def _repeated(x: Array, q: Array) -> Array:
    """Return keys or values for every query head."""
    return np.repeat(_wide(x), q.shape[1] // x.shape[1], axis=1)


def _sdpa(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if callable(mask):
        shape = (*q.shape[:3], k.shape[2])
        index = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        mask = mask(*index)
    # The fused backward uses lse: with a large additive mask its gradients are n times too large.
    additive = mask is not None and mask.dtype != torch.bool
    backends = [SDPBackend.MATH] if additive else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(backends):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
