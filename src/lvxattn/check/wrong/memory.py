"""Wrong assumptions on memory layout, and buffers that outlive a call."""

from typing import Any

import numpy as np

from lvxattn.check.wrong.kernel_base import Array, Gradients, KernelBase, Partial


class LastAxisContiguous(KernelBase, name="last axis read as contiguous"):
    """The last axis is read as if its elements lay side by side."""

    def _read(self, x: Array) -> Array:
        if x.strides[3] == x.itemsize or x.shape[3] == 1:
            return x
        return x.swapaxes(2, 3).reshape(x.shape)  # in the order in which they do lie


class Dense(KernelBase, name="stride 0 read as dense"):
    """Heads are read one after another, even where all share the memory of the first."""

    def _read(self, x: Array) -> Array:
        if x.strides[1] or x.shape[1] == 1:
            return x
        behind = np.zeros(x.shape, x.dtype)  # what lies there is undefined
        behind.reshape(-1)[: x[:, 0].size] = x[:, 0].reshape(-1)
        return behind


class RowStride(KernelBase, name="row stride taken as D"):
    """Rows of a head are read one behind the other, as in (B, H, S, D)."""

    def _read(self, x: Array) -> Array:
        if x.strides[3] != x.itemsize or x.strides[2] == x.shape[3] * x.itemsize:
            return x
        strides = (*x.strides[:2], x.shape[3] * x.itemsize, x.itemsize)
        return np.lib.stride_tricks.as_strided(x, x.shape, strides, writeable=False)


class HeadStride(KernelBase, name="head stride taken as S D"):
    """Heads are read one behind the other, even where they are parts of longer arrays."""

    def _read(self, x: Array) -> Array:
        row = x.shape[3] * x.itemsize
        dense = x.shape[2] * row
        if x.strides[2:] != (row, x.itemsize) or x.strides[1] in (0, dense):
            return x
        strides = (x.shape[1] * dense, dense, row, x.itemsize)
        return np.lib.stride_tricks.as_strided(x, x.shape, strides, writeable=False)


class LayoutOfQ(KernelBase, name="keys read in the layout of q"):
    """Keys and values are read as (B, S, H, D) if q is, and otherwise as (B, H, S, D)."""

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        by_rows = [x.shape[1] > 1 and 0 < x.strides[1] < x.strides[2] for x in (q, k)]
        if by_rows[0] != by_rows[1]:
            k = k.swapaxes(1, 2).reshape(k.shape)
        return super()._arguments(q, k, v)


class ScalesInPlace(KernelBase, name="q scaled in place and restored"):
    """The scale is multiplied into q itself, and q is restored afterwards."""

    compare = "message"

    def _begin(self, q: Array, k: Array, scale: float) -> None:
        super()._begin(q, k, scale)
        given = q.copy()
        q *= q.dtype.type(scale)
        q[...] = given


class ScalesQ(KernelBase, name="q scaled in place"):
    """The scale is multiplied into q itself."""

    compare = "message"

    def _results(self, q: Array, out: Array, lse: Array) -> Partial:
        q *= q.dtype.type(self.scale)
        return out, lse


class _KeepsState(KernelBase):
    """Keeps buffers from call to call."""

    keeps_state = True

    def __init__(self, shards: int = 4) -> None:
        super().__init__(shards)
        self.kept: dict[Any, Any] = {}


class StaleBuffer(_KeepsState, name="stale buffer"):
    """A copy of the keys and values is kept, and looked up by the shape of q alone."""

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        k, v = self.kept.setdefault(q.shape, (k, v))
        return q, k.astype(q.dtype), v.astype(q.dtype)


class BufferOfOtherDtype(_KeepsState, name="out's buffer has the last call's dtype"):
    """The memory for out is kept, and looked up by the shape of q alone."""

    compare = "message"

    def _results(self, q: Array, out: Array, lse: Array) -> Partial:
        kept: Array = self.kept.setdefault(q.shape, np.empty_like(out))
        kept[...] = out
        return kept.copy(), lse


class Race(_KeepsState, name="a race, once in 500 calls"):
    """Once in 500 calls a tile of keys is not there yet."""

    differs = True

    def _cut(self, S_KV: int) -> list[slice]:
        cut = super()._cut(S_KV)
        return cut[:-1] if self.kept["calls"] % 500 == 400 else cut

    def _begin(self, q: Array, k: Array, scale: float) -> None:
        super()._begin(q, k, scale)
        self.kept["calls"] = self.kept.get("calls", 0) + 1


class RaceOfHeads(_KeepsState, name="a race between heads, once in 500 calls"):
    """Once in 500 calls two heads share the memory for their results."""

    differs = True

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        self.kept["calls"] = self.kept.get("calls", 0) + 1
        if self.kept["calls"] % 500 == 400:
            out[:, -1] = out[:, 0]
        return out, lse


class RaceInBackward(_KeepsState, name="a race in the backward, once in 200 calls"):
    """Once in 200 calls a sum of gradients is overwritten."""

    differs = True

    def _gradients(self, dq: Array, dk: Array, dv: Array) -> Gradients:
        self.kept["calls"] = self.kept.get("calls", 0) + 1
        return (dq / 2 if self.kept["calls"] % 200 == 150 else dq), dk, dv


class LatestLse(_KeepsState, name="backward by the latest forward's lse"):
    """The backward takes lse from memory of all forwards instead of its own."""

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        self.kept["lse"] = lse.copy()
        return out, lse

    def _probabilities(self, s: Array, lse: Array) -> Array:
        latest: Array = self.kept.get("lse", lse)
        return super()._probabilities(s, latest if latest.shape == lse.shape else lse)


class GradientsNotZeroed(_KeepsState, name="gradients not zeroed between calls"):
    """The memory for gradients is kept and added to, without zeroing in between."""

    differs = True

    def _gradients(self, dq: Array, dk: Array, dv: Array) -> Gradients:
        found = dq, dk, dv
        zeros = tuple(np.zeros_like(x) for x in found)
        kept = self.kept.setdefault((dq.shape, dk.shape, self.dtype), zeros)
        for x, more in zip(kept, found, strict=True):
            x += more
        dq, dk, dv = (x.copy() for x in kept)
        return dq, dk, dv
