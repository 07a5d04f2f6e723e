"""A right kernel, in small steps for wrong ones to override.

    a shard of the keys:   s = scale q k^T + mask,  p = exp(s - max s),  out = p v / sum p
    their union:           merged, with lse as the two numbers max s and log sum p
    backward:              p = exp(s - lse - low),  ds = p (dout v^T - delta)

It is in another style than `rounded.py`, which sets the limit: keys cut in shards, heads of keys
repeated, gradients taken shard by shard.
"""

from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lvxattn.check.masks import Mask
from lvxattn.common.validation import accumulator

Array = npt.NDArray[Any]
Shape = tuple[int, int, int, int]  # B, H, S_Q, S_KV


class KernelBase:
    """Attention over shards of the keys, on NumPy arrays of any floating dtype.

    A wrong kernel is a subclass that overrides one step.  An instance may remember what it was
    called with, so each use takes a fresh one.

    Parameters
    ----------
    shards : int
        In how many pieces the keys are; some are empty where there are fewer keys.

    Attributes
    ----------
    variants : tuple of dict
        Arguments with which the diagnosis tries the class; the first are the defaults.
    compare : str
        What the diagnosis compares: ``"values"``; ``"size"``, that of the error, for what only
        rounds differently; or ``"complaint"``, for what returns no result at all.
    remembers : bool
        Whether a call depends on those before.
    """

    variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"shards": 1})
    compare: ClassVar[str] = "values"
    remembers: ClassVar[bool] = False

    def __init__(self, shards: int = 4) -> None:
        self.shards = shards

    def __call__(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        """Return out and lse."""
        with np.errstate(all="ignore"):
            return self._forward(q, k, v, scale=scale, mask=mask)

    def backward(
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
        """Return dq, dk and dv."""
        with np.errstate(all="ignore"):
            return self._backward(dout, q, k, v, out, lse, scale=scale, mask=mask)

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        self.dtype = q.dtype
        shape = (*q.shape[:3], k.shape[2])
        q, k, v = self._arguments(q, k, v)
        scale, mask = self._scale(scale, q.shape[3]), self._mask(mask, shape)
        parts = self._parts(q, k, v, scale=scale, mask=mask)
        out, lse = self._join(parts, np.zeros((*shape[:3], v.shape[3]), v.dtype))
        return out.astype(self.dtype), lse

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
        self.dtype = q.dtype
        shape, kv_heads = (*q.shape[:3], k.shape[2]), k.shape[1]
        q, k, v = self._arguments(q, k, v)
        dout, out = self._wide(self._read(dout)), self._wide(out)
        scale, mask = self._scale(scale, q.shape[3]), self._mask(mask, shape)
        delta = self._delta(dout, out)
        low = self._low(q, k, v, lse, scale=scale, mask=mask)
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for keys in self._cut(shape[3]):
            s = self._hide(scale * self._scores(q, k[:, :, keys]), self._tile(mask, shape, keys))
            p = self._probabilities(s, lse)
            p = p if low is None else p * np.exp(-low)[..., None]
            dp = self._dot(dout, v[:, :, keys].swapaxes(-1, -2))
            ds = self._rounded(self._score_gradients(p, dp, delta))
            dq = self._add(dq, self._dq(ds, k[:, :, keys], scale))
            dk[:, :, keys] = self._dk(ds, q, scale)
            dv[:, :, keys] = self._dot(self._rounded(p).swapaxes(-1, -2), dout)
        dk, dv = self._sum_heads(dk, kv_heads), self._sum_heads(dv, kv_heads)
        return dq.astype(self.dtype), dk.astype(self.dtype), dv.astype(self.dtype)

    # What both begin with.

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Return what is computed with: in the accumulator dtype, one key head per query head."""
        heads = self._kv_head(q.shape[1], k.shape[1])
        q, k, v = (self._wide(self._read(x)) for x in (q, k, v))
        return q, k[:, heads], v[:, heads]

    def _read(self, x: Array) -> Array:
        return x

    def _wide(self, x: Array) -> Array:
        return x.astype(_accumulator(self.dtype))

    def _kv_head(self, H: int, H_KV: int) -> Array:
        """Return which key-value head each query head reads."""
        return np.arange(H) // (H // H_KV)

    def _scale(self, scale: float, _D: int) -> Any:
        return scale

    def _mask(self, mask: Mask, _shape: Shape) -> Mask:
        return mask

    def _cut(self, S_KV: int) -> list[slice]:
        """Return the shards; the first ones take what is left over."""
        size, more = divmod(S_KV, self.shards)
        edges = [n * size + min(n, more) for n in range(self.shards + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def _scores(self, q: Array, k: Array) -> Array:
        return self._dot(q, k.swapaxes(-1, -2))

    def _tile(self, mask: Mask, shape: Shape, keys: slice) -> Array | None:
        """Return the part of the mask that is about one shard."""
        if callable(mask):
            b, h, q_index, kv_index = np.ix_(*map(np.arange, shape))
            return np.asarray(mask(b, h, q_index, kv_index[..., keys]))
        return None if mask is None else mask[..., keys]

    def _hide(self, s: Array, mask: Array | None) -> Array:
        if mask is None:
            return s
        hidden: Array = np.where(mask, s, -np.inf) if mask.dtype == bool else s + self._wide(mask)
        return hidden

    # One shard, and the union of all.

    def _parts(
        self, q: Array, k: Array, v: Array, *, scale: Any, mask: Mask
    ) -> list[tuple[Array, Array]]:
        """Return out and lse, as two numbers whose sum it is, of every shard."""
        shape = (*q.shape[:3], k.shape[2])
        parts = []
        for keys in self._cut(shape[3]):
            s = self._hide(scale * self._scores(q, k[:, :, keys]), self._tile(mask, shape, keys))
            parts.append(self._attend(s, v[:, :, keys]))
        return parts

    def _attend(self, s: Array, v: Array) -> tuple[Array, Array]:
        top = self._top(s)
        p = self._exp(s - top)
        total = self._total(p)
        out = self._dot(self._rounded(p), v) / np.where(total == 0, 1, total)
        return out, np.concatenate([top, np.log(total)], axis=-1)

    def _top(self, s: Array) -> Array:
        top = s.max(axis=-1, keepdims=True, initial=-np.inf)
        return np.where(top == -np.inf, 0, top).astype(s.dtype)

    def _exp(self, x: Array) -> Array:
        return np.exp(x)

    def _total(self, p: Array) -> Array:
        total: Array = p.sum(axis=-1, keepdims=True)
        return total

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        """Merge all shards into out, which is zeros."""
        out, lse = self._union(parts, out)
        return out, lse.sum(axis=-1)

    def _union(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        lse = np.full((*out.shape[:3], 2), (0, -np.inf), out.dtype)
        for part in parts:
            out, lse = self._merge(out, lse, *part)
        return out, lse

    def _merge(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
        seen_a, seen_b = lse_a[..., 1:] > -np.inf, lse_b[..., 1:] > -np.inf
        top_a, top_b = lse_a[..., :1], lse_b[..., :1]
        top = np.where(seen_a & seen_b, np.maximum(top_a, top_b), np.where(seen_a, top_a, top_b))
        # Each at most its own sum of probabilities: what a shard does not see is exp(-inf).
        a, b = np.exp(top_a - top + lse_a[..., 1:]), np.exp(top_b - top + lse_b[..., 1:])
        a, b = np.where(seen_a, a, 0), np.where(seen_b, b, 0)
        total = np.where(a + b == 0, 1, a + b).astype(a.dtype)
        lse = np.concatenate([top, np.log(a + b)], axis=-1)
        return a / total * out_a + b / total * out_b, lse

    # The backward's own.

    def _low(
        self, q: Array, k: Array, v: Array, lse: Array, *, scale: Any, mask: Mask
    ) -> Array | None:
        """Return what an lse has lost in rounding, from which a forward finds it, if any is large.

        Beside -1e9, lse does not say how many keys there are.
        """
        if not (abs(lse[lse > -np.inf]) > 256).any():
            return None
        parts = self._parts(q, k, v, scale=scale, mask=mask)
        _, whole = self._union(parts, np.zeros((*q.shape[:3], v.shape[3]), v.dtype))
        top, total = whole[..., 0], whole[..., 1]
        return np.where(lse == -np.inf, 0, top - lse + total).astype(v.dtype)

    def _delta(self, dout: Array, out: Array) -> Array:
        delta: Array = (dout * out).sum(axis=-1, keepdims=True)
        return delta

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return self._exp(s - np.where(lse == -np.inf, 0, lse).astype(s.dtype)[..., None])

    def _score_gradients(self, p: Array, dp: Array, delta: Array) -> Array:
        ds: Array = p * (dp - delta)
        return ds

    def _dq(self, ds: Array, k: Array, scale: Any) -> Array:
        dq: Array = scale * self._dot(ds, k)
        return dq

    def _add(self, dq: Array, part: Array) -> Array:
        total: Array = dq + part
        return total

    def _dk(self, ds: Array, q: Array, scale: Any) -> Array:
        dk: Array = scale * self._dot(ds.swapaxes(-1, -2), q)
        return dk

    def _sum_heads(self, dx: Array, H_KV: int) -> Array:
        """Sum over the query heads that read one key-value head."""
        total = np.zeros((dx.shape[0], H_KV, *dx.shape[2:]), dx.dtype)
        for h, kv_head in enumerate(self._kv_head(dx.shape[1], H_KV)):
            total[:, kv_head] += dx[:, h]
        return total

    # Arithmetic.

    def _dot(self, x: Array, y: Array) -> Array:
        product: Array = x @ y
        return product

    def _rounded(self, x: Array) -> Array:
        return x.astype(self.dtype).astype(x.dtype)


@cache  # NumPy takes its time to tell a dtype's name
def _accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(accumulator(dtype.name))
