"""A correct kernel, in small steps for wrong ones to override.

    a shard of the keys:   s = scale q k^T + mask,  p = exp(s - max s),  out = p v / sum p
    their union:           merged, with lse as the two numbers max s and log sum p
    backward:              p = exp(s - lse - low),  ds = p (dout v^T - delta)

It computes in another way than `rounding_model`, which sets the limit: keys are cut into shards,
key-value heads repeated, and gradients computed shard by shard.
"""

from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Mask, mask_array
from lvxattn.common.validation import accumulator

Array = npt.NDArray[Any]
# out or dout, and lse, which may be two numbers whose sum it is: (B, H, S_Q, 2).
Partial = tuple[Array, Array]
Gradients = tuple[Array, Array, Array]


class KernelBase:
    """Attention over shards of the keys, on NumPy arrays of any floating dtype.

    A wrong kernel is a subclass that overrides one step.  An instance may keep state between calls,
    so each check takes a fresh one.

    Parameters
    ----------
    shards : int
        Number of shards of the keys; some are empty where there are fewer keys.

    Attributes
    ----------
    name : str
        What a diagnosis calls the defect, of the class: ``class X(KernelBase, name="no scale")``.
    variants : tuple of dict
        Arguments with which the diagnosis tries the class; the first are the defaults.
    compare : str
        What the diagnosis compares: ``"values"``; ``"size"``, that of the error, for what only
        rounds differently; or ``"message"``, for what returns no result at all.
    keeps_state : bool
        Whether a call depends on earlier ones.
    differs : bool
        Whether equal calls can give other results.
    dtype : dtype
    shape : tuple of int
        (B, H, S_Q, S_KV).
    scale : float
        As given to the call under way.
    """

    name: ClassVar[str] = ""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"shards": 1})
    compare: ClassVar[str] = "values"
    keeps_state: ClassVar[bool] = False
    differs: ClassVar[bool] = False

    dtype: np.dtype[Any]
    shape: tuple[int, int, int, int]
    scale: float

    def __init_subclass__(cls, name: str = "") -> None:
        """Set the name of a wrong kernel."""
        cls.name = name

    def __init__(self, shards: int = 4) -> None:
        self.shards = shards

    @np.errstate(all="ignore")
    def __call__(self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask) -> Partial:
        """Return out and lse."""
        self._begin(q, k, scale)
        wide_q, wide_k, wide_v = self._arguments(q, k, v)
        parts = self._parts(wide_q, wide_k, wide_v, self._mask(self._lift(mask)))
        out, lse = self._join(parts, np.zeros((*self.shape[:3], v.shape[3]), wide_v.dtype))
        return self._results(q, out.astype(self.dtype), lse)

    @np.errstate(all="ignore")
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
    ) -> Gradients:
        """Return dq, dk and dv."""
        self._begin(q, k, scale)
        kv_heads = k.shape[1]
        q, k, v = self._arguments(q, k, v)
        dout, mask = self._wide(self._read(dout)), self._backward_mask(self._lift(mask))
        delta = self._delta(dout, self._wide(out))
        low = self._low(q, k, v, lse, mask)
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for keys in self._cut(self.shape[3]):
            p = self._probabilities(self._masked_scores(q, k, mask, keys), lse)
            p = p if low is None else p * np.exp(-low)[..., None]
            dp = self._dot(dout, v[:, :, keys].swapaxes(-1, -2))
            ds = self._rounded(self._score_gradients(p, dp, delta))
            dq = self._add(dq, self._dq(ds, k[:, :, keys]))
            dk[:, :, keys] = self._dk(ds, q)
            dv[:, :, keys] = self._dot(self._rounded(p).swapaxes(-1, -2), dout)
        dk, dv = self._sum_heads(dk, kv_heads), self._sum_heads(dv, kv_heads)
        dq, dk, dv = (x.astype(self.dtype) for x in (dq, dk, dv))
        return self._gradients(dq, dk, dv)

    # Arguments and scores, forward and backward.

    def _begin(self, q: Array, k: Array, scale: float) -> None:
        self.dtype, self.shape, self.scale = q.dtype, (*q.shape[:3], k.shape[2]), scale

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Return q, k and v in the accumulator dtype, with one key-value head per query head."""
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

    def _scale(self, _D: int) -> Any:
        return self.scale

    def _lift(self, mask: Mask) -> Mask:
        """Return an array with all four axes."""
        if isinstance(mask, np.ndarray):
            return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        return mask

    def _mask(self, mask: Mask) -> Mask:
        return mask

    def _backward_mask(self, mask: Mask) -> Mask:
        return self._mask(mask)

    def _cut(self, S_KV: int) -> list[slice]:
        """Return the shards; the first ones take what is left over."""
        size, more = divmod(S_KV, self.shards)
        edges = [n * size + min(n, more) for n in range(self.shards + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def _masked_scores(self, q: Array, k: Array, mask: Mask, keys: slice) -> Array:
        s = self._scale(q.shape[3]) * self._scores(q, k[:, :, keys])
        return self._hide(s, self._tile(mask, keys))

    def _scores(self, q: Array, k: Array) -> Array:
        return self._dot(q, k.swapaxes(-1, -2))

    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        """Return the part of the mask that belongs to one shard."""
        return mask_array(mask, self.shape, keys)

    def _hide(self, s: Array, mask: Array | None) -> Array:
        if mask is None:
            return s
        return np.where(mask, s, -np.inf) if mask.dtype == bool else np.add(s, self._wide(mask))

    # One shard, and the union of all.

    def _parts(self, q: Array, k: Array, v: Array, mask: Mask) -> list[Partial]:
        """Return out and lse, as two numbers whose sum it is, of every shard."""
        return [
            self._attend(self._masked_scores(q, k, mask, keys), v[:, :, keys])
            for keys in self._cut(self.shape[3])
        ]

    def _attend(self, s: Array, v: Array) -> Partial:
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
        return np.asarray(p.sum(axis=-1, keepdims=True))

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        """Merge all shards into out, which is zeros."""
        out, lse = self._union(parts, out)
        return out, lse.sum(axis=-1)

    def _union(self, parts: list[Partial], out: Array) -> Partial:
        lse = np.full((*out.shape[:3], 2), (0, -np.inf), out.dtype)
        for part in parts:
            out, lse = self._merge(out, lse, *part)
        return out, lse

    def _merge(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> Partial:
        seen_a, seen_b = lse_a[..., 1:] > -np.inf, lse_b[..., 1:] > -np.inf
        top_a, top_b = lse_a[..., :1], lse_b[..., :1]
        top = np.where(seen_a & seen_b, np.maximum(top_a, top_b), np.where(seen_a, top_a, top_b))
        # Each at most its own sum of probabilities: what a shard does not see is exp(-inf).
        a, b = np.exp(top_a - top + lse_a[..., 1:]), np.exp(top_b - top + lse_b[..., 1:])
        a, b = np.where(seen_a, a, 0), np.where(seen_b, b, 0)
        total = np.where(a + b == 0, 1, a + b).astype(a.dtype)
        lse = np.concatenate([top, np.log(a + b)], axis=-1)
        return a / total * out_a + b / total * out_b, lse

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        """Return what the call returns; q is the caller's array."""
        return out, lse

    # The backward's own.

    def _low(self, q: Array, k: Array, v: Array, lse: Array, mask: Mask) -> Array | None:
        """Return what rounding took from lse, by another forward, or None if every |lse| is small.

        Beside -1e9, lse has lost the number of keys.
        """
        if not (abs(lse[lse > -np.inf]) > 256).any():
            return None
        parts = self._parts(q, k, v, mask)
        _, both = self._union(parts, np.zeros((*self.shape[:3], v.shape[3]), v.dtype))
        top, total = both[..., 0], both[..., 1]
        return np.where(lse == -np.inf, 0, top - lse + total).astype(v.dtype)

    def _delta(self, dout: Array, out: Array) -> Array:
        return np.asarray((dout * out).sum(axis=-1, keepdims=True))

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return self._exp(s - np.where(lse == -np.inf, 0, lse).astype(s.dtype)[..., None])

    def _score_gradients(self, p: Array, dp: Array, delta: Array) -> Array:
        return np.asarray(p * (dp - delta))

    def _dq(self, ds: Array, k: Array) -> Array:
        return np.asarray(self._scale(k.shape[3]) * self._dot(ds, k))

    def _add(self, dq: Array, part: Array) -> Array:
        return np.asarray(dq + part)

    def _dk(self, ds: Array, q: Array) -> Array:
        return np.asarray(self._scale(q.shape[3]) * self._dot(ds.swapaxes(-1, -2), q))

    def _sum_heads(self, dx: Array, H_KV: int) -> Array:
        """Sum over the query heads that read one key-value head."""
        total = np.zeros((dx.shape[0], H_KV, *dx.shape[2:]), dx.dtype)
        for h, kv_head in enumerate(self._kv_head(dx.shape[1], H_KV)):
            total[:, kv_head] += dx[:, h]
        return total

    def _gradients(self, dq: Array, dk: Array, dv: Array) -> Gradients:
        """Return what the backward returns."""
        return dq, dk, dv

    # Arithmetic.

    def _dot(self, x: Array, y: Array) -> Array:
        return np.asarray(x @ y)

    def _rounded(self, x: Array) -> Array:
        return x.astype(self.dtype).astype(x.dtype)


@cache  # NumPy takes its time to tell a dtype's name
def _accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(accumulator(dtype.name))
