"""Wrong scores and wrong exponentials."""

from typing import Any

import numpy as np

from lvxattn.check.masks import Mask
from lvxattn.check.wrong.kernel_base import Array, KernelBase


class NoScale(KernelBase):
    """The scores are not scaled, nor are the gradients."""

    def _scale(self, _scale: float, _D: int) -> Any:
        return 1.0


class ScaleTwice(KernelBase):
    """The scale is multiplied into q and into the scores."""

    def _scale(self, scale: float, _D: int) -> Any:
        return scale**2


class OwnScale(KernelBase):
    """It takes 1 / sqrt(D) whatever it is given."""

    def _scale(self, _scale: float, D: int) -> Any:
        return D**-0.5


class ShortenedD(KernelBase):
    """The loop over D takes 8 components a step and leaves the rest of them out."""

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        if q.shape[3] >= 8:
            q[..., q.shape[3] // 8 * 8 :] = 0
            k[..., k.shape[3] // 8 * 8 :] = 0
        return q, k, v


class WrappingExp(KernelBase):
    """The exponential is made of a float's bits, and below -87 the exponent wraps around."""

    def _exp(self, x: Array) -> Array:
        wraps = (x < -87) & (x > -265)  # further below, the conversion saturates
        return np.where(wraps, -np.exp(np.where(wraps, x, 0) + 177), np.exp(x)).astype(x.dtype)


class MeanForMaximum(KernelBase):
    """The mean of the scores is subtracted from them instead of the maximum."""

    def _top(self, s: Array) -> Array:
        total: Array = np.where(np.isfinite(s), s, 0).sum(axis=-1, keepdims=True)
        return np.asarray(total / max(1, s.shape[3]), s.dtype)


class MaximumFromZero(KernelBase):
    """The running maximum starts at 0 instead of -inf: exp underflows where all scores are low."""

    def _top(self, s: Array) -> Array:
        return np.maximum(super()._top(s), 0)


class MaximumFromLow(KernelBase):
    """The running maximum starts at -1e5 instead of -inf, as if no score could be lower."""

    def _top(self, s: Array) -> Array:
        return np.maximum(super()._top(s), -1e5).astype(s.dtype)


class CappedScores(KernelBase):
    """Scores are cut off at 700, so that exp does not overflow."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        return np.minimum(super()._hide(s, mask), 700)


class NoMaximum(KernelBase):
    """Scores are exponentiated without subtracting their maximum."""

    def _top(self, s: Array) -> Array:
        return np.zeros_like(super()._top(s))


class FirstMaximum(KernelBase):
    """The first shard's maximum is subtracted from the scores of every shard."""

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        self.first: Array | None = None
        return super()._forward(q, k, v, scale=scale, mask=mask)

    def _top(self, s: Array) -> Array:
        if self.first is None:
            self.first = super()._top(s)
        return self.first


SCORES: dict[str, type[KernelBase]] = {
    "no scale": NoScale,
    "scale twice": ScaleTwice,
    "scale argument ignored": OwnScale,
    "D rounded down to a multiple of 8": ShortenedD,
    "exp wraps around below -87": WrappingExp,
    "mean subtracted for the maximum": MeanForMaximum,
    "maximum starts at 0": MaximumFromZero,
    "maximum starts at -1e5": MaximumFromLow,
    "scores capped at 700": CappedScores,
    "exp without a maximum": NoMaximum,
    "first shard's maximum for all": FirstMaximum,
}
