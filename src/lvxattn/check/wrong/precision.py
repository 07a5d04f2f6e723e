"""Roundings that no correct kernel makes."""

import numpy as np

from lvxattn.check.wrong.kernel_base import Array, KernelBase, Partial


class HalfAccumulator(KernelBase, name="half-precision accumulator"):
    """Half-precision inputs are summed in half precision, 16 products at a time."""

    compare = "size"

    def _dot(self, x: Array, y: Array) -> Array:
        if self.dtype.itemsize > 2:
            return super()._dot(x, y)
        total = np.zeros((*x.shape[:3], y.shape[3]), x.dtype)
        for start in range(0, x.shape[3], 16):
            terms = slice(start, start + 16)
            total = self._rounded(total + super()._dot(x[..., terms], y[:, :, terms]))
        return total


class HalfMerge(KernelBase, name="half precision between shards"):
    """What travels between 64 shards is rounded to half precision after every merge."""

    compare = "size"
    variants = tuple({"shards": shards} for shards in (64, 16, 8))

    def __init__(self, shards: int = 64) -> None:
        super().__init__(shards)

    def _merge(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> Partial:
        out, lse = super()._merge(out_a, lse_a, out_b, lse_b)
        return self._rounded(out), lse

    def _add(self, dq: Array, part: Array) -> Array:
        return self._rounded(super()._add(dq, part))


class HalfLse(KernelBase, name="half-precision lse"):
    """The lse is stored in half precision."""

    compare = "size"

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        return out, self._rounded(lse)


class HalfScores(KernelBase, name="half-precision scores"):
    """Scores are stored in half precision before the softmax."""

    compare = "size"

    def _scores(self, q: Array, k: Array) -> Array:
        return self._rounded(super()._scores(q, k))


class SinglePrecision(KernelBase, name="fp64 computed in fp32"):
    """Inputs in fp64 are computed with in fp32."""

    compare = "size"

    def _results(self, q: Array, out: Array, lse: Array) -> Partial:
        return out, lse.astype(np.float64 if q.dtype == np.float64 else lse.dtype)

    def _wide(self, x: Array) -> Array:
        return x.astype(np.float32)


class TF32(KernelBase, name="TF32 products"):
    """Factors of products in fp32 are rounded to 10 bits of mantissa."""

    compare = "size"
    bits = 10

    def _dot(self, x: Array, y: Array) -> Array:
        if self.dtype == np.float32:
            x, y = _shortened(x, self.bits), _shortened(y, self.bits)
        return super()._dot(x, y)


class BF16(TF32, name="bf16 products"):
    """Factors of products in fp32 are rounded to bfloat16."""

    bits = 7


class CubicExp(KernelBase, name="cubic exp"):
    """The exponential is a cubic polynomial between the powers of 2."""

    def _exp(self, x: Array) -> Array:
        whole = np.floor(np.maximum(x / np.log(2), -2000))
        part = np.where(x == -np.inf, 0, x / np.log(2) - whole)
        mantissa = 1 + part * (0.69589 + part * (0.22606 + part * 0.07805))
        return np.where(x == -np.inf, 0, np.ldexp(mantissa, whole.astype(int))).astype(x.dtype)


def _shortened(x: Array, bits: int) -> Array:
    mantissa, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.round(mantissa * 2 ** (bits + 1)), exponent - bits - 1), x.dtype)
