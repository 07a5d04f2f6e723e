"""Wrong scores and wrong exponentials."""

from typing import Any

import numpy as np

from lvxattn.check.wrong.kernel_base import Array, KernelBase


class NoScale(KernelBase, name="no scale"):
    """Neither scores nor gradients are scaled."""

    def _scale(self, _D: int) -> Any:
        return 1.0


class ScaleTwice(KernelBase, name="scale twice"):
    """Both q and the scores are multiplied by the scale."""

    def _scale(self, _D: int) -> Any:
        return self.scale**2


class OwnScale(KernelBase, name="scale argument ignored"):
    """The scale is always 1 / sqrt(D), not the argument."""

    def _scale(self, D: int) -> Any:
        return D**-0.5


class ShortenedD(KernelBase, name="D rounded down to a multiple of 8"):
    """The loop over D takes 8 components a step and omits the remainder."""

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        if q.shape[3] >= 8:
            q[..., q.shape[3] // 8 * 8 :] = 0
            k[..., k.shape[3] // 8 * 8 :] = 0
        return q, k, v


class WrappingExp(KernelBase, name="exp wraps around below -87"):
    """The exponential is made of a float's bits, and below -87 the exponent wraps around."""

    def _exp(self, x: Array) -> Array:
        wraps = (x < -87) & (x > -265)  # further below, the conversion saturates
        return np.where(wraps, -np.exp(np.where(wraps, x, 0) + 177), np.exp(x)).astype(x.dtype)


class MeanForMaximum(KernelBase, name="mean subtracted for the maximum"):
    """The mean of the scores is subtracted from them instead of the maximum."""

    def _top(self, s: Array) -> Array:
        total: Array = np.where(np.isfinite(s), s, 0).sum(axis=-1, keepdims=True)
        return np.asarray(total / max(1, s.shape[3]), s.dtype)


class ZeroIsNone(KernelBase, name="scale of 0 taken for none"):
    """A scale of 0 is replaced by 1 / sqrt(D)."""

    def _scale(self, D: int) -> Any:
        return super()._scale(D) or D**-0.5


class MaximumFromZero(KernelBase, name="maximum starts at 0"):
    """The running maximum starts at 0 instead of -inf: exp underflows where all scores are low."""

    def _top(self, s: Array) -> Array:
        return np.maximum(super()._top(s), 0)


class MaximumFromLow(KernelBase, name="maximum starts at -1e5"):
    """The running maximum starts at -1e5 instead of -inf, as if no score could be lower."""

    def _top(self, s: Array) -> Array:
        return np.maximum(super()._top(s), -1e5).astype(s.dtype)


class CappedScores(KernelBase, name="scores capped at 700"):
    """Scores are capped at 700, so that exp does not overflow."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        return np.minimum(super()._hide(s, mask), 700)


class NoMaximum(KernelBase, name="exp without a maximum"):
    """Scores are exponentiated without subtracting their maximum."""

    def _top(self, s: Array) -> Array:
        return np.zeros_like(super()._top(s))


class FirstMaximum(KernelBase, name="first shard's maximum for all"):
    """The first shard's maximum is subtracted from the scores of every shard."""

    def _begin(self, q: Array, k: Array, scale: float) -> None:
        super()._begin(q, k, scale)
        self.first: Array | None = None

    def _top(self, s: Array) -> Array:
        if self.first is None:
            self.first = super()._top(s)
        return self.first
