"""Arrays that are not what was expected in memory, and buffers that outlive a call."""

from typing import Any

import numpy as np

from lvxattn.check.masks import Mask
from lvxattn.check.wrong.kernel_base import Array, KernelBase


class LastAxisContiguous(KernelBase):
    """The last axis is read as if its elements lay side by side."""

    def _read(self, x: Array) -> Array:
        if x.strides[3] == x.itemsize or x.shape[3] == 1:
            return x
        return x.swapaxes(2, 3).reshape(x.shape)  # in the order in which they do lie


class Dense(KernelBase):
    """Heads are read one behind the other, also where all have the memory of the first."""

    def _read(self, x: Array) -> Array:
        if x.strides[1] or x.shape[1] == 1:
            return x
        behind = np.zeros(x.shape, x.dtype)  # what really lies there is anybody's guess
        behind.reshape(-1)[: x[:, 0].size] = x[:, 0].reshape(-1)
        return behind


class ScalesInPlace(KernelBase):
    """The scale is multiplied into q itself, and taken back in the end."""

    compare = "complaint"

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        given = q.copy()
        q *= q.dtype.type(scale)
        q[...] = given
        return super()._forward(q, k, v, scale=scale, mask=mask)


class ScalesQ(KernelBase):
    """The scale is multiplied into q itself."""

    compare = "complaint"

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        result = super()._forward(q, k, v, scale=scale, mask=mask)
        q *= q.dtype.type(scale)
        return result


class _Remembers(KernelBase):
    """Keeps something from call to call."""

    remembers = True

    def __init__(self, shards: int = 4) -> None:
        super().__init__(shards)
        self.kept: dict[Any, Any] = {}


class StaleBuffer(_Remembers):
    """A copy of the keys and values is kept, and found again by the shape of q alone."""

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        k, v = self.kept.setdefault(q.shape, (k, v))
        return q, k.astype(q.dtype), v.astype(q.dtype)


class BufferOfOtherDtype(_Remembers):
    """The memory for out is kept, and found again by the shape of q alone."""

    compare = "complaint"

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        out, lse = super()._forward(q, k, v, scale=scale, mask=mask)
        kept: Array = self.kept.setdefault(q.shape, np.empty_like(out))
        kept[...] = out
        return kept.copy(), lse


class GradientsNotZeroed(_Remembers):
    """The memory for gradients is kept and added to, and not set to 0 in between."""

    def _backward(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        lse: Array,
        *,
        scale: float,
        mask: Mask,
    ) -> tuple[Array, Array, Array]:
        found = super()._backward(dout, q, k, v, out, lse, scale=scale, mask=mask)
        zeros = tuple(np.zeros_like(x) for x in found)
        kept = self.kept.setdefault((q.shape, k.shape, self.dtype), zeros)
        for x, more in zip(kept, found, strict=True):
            x += more
        dq, dk, dv = (x.copy() for x in kept)
        return dq, dk, dv


MEMORY: dict[str, type[KernelBase]] = {
    "last axis read as contiguous": LastAxisContiguous,
    "stride 0 read as dense": Dense,
    "q scaled in place and restored": ScalesInPlace,
    "q scaled in place": ScalesQ,
    "stale buffer": StaleBuffer,
    "out's buffer has the last call's dtype": BufferOfOtherDtype,
    "gradients not zeroed between calls": GradientsNotZeroed,
}
