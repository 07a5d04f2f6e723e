"""Wrong gradients."""

from typing import Any

import numpy as np

from lvxattn.check.masks import Mask
from lvxattn.check.wrong.kernel_base import Array, KernelBase
from lvxattn.check.wrong.sums import SHARDS


class NoDelta(KernelBase):
    """The softmax's own gradient is forgotten: ds = p dp."""

    def _delta(self, dout: Array, out: Array) -> Array:
        return np.zeros_like(super()._delta(dout, out))


class AddedDelta(KernelBase):
    """Delta is added instead of subtracted."""

    def _delta(self, dout: Array, out: Array) -> Array:
        return -super()._delta(dout, out)


class ShardDelta(KernelBase):
    """Delta is taken from one shard's probabilities instead of from all."""

    variants = SHARDS

    def _score_gradients(self, p: Array, dp: Array, _delta: Array) -> Array:
        own: Array = (p * dp).sum(axis=-1, keepdims=True)
        return super()._score_gradients(p, dp, own)


class ShardProbabilities(KernelBase):
    """The backward normalizes the probabilities of every shard by itself."""

    variants = SHARDS

    def _probabilities(self, s: Array, _lse: Array) -> Array:
        p = self._exp(s - self._top(s))
        total = self._total(p)
        normalized: Array = p / np.where(total == 0, 1, total)
        return normalized


class RoundedLse(KernelBase):
    """The backward takes exp(s - lse), n times too large where lse has lost log n."""

    def _low(self, *_arguments: Any, **_options: Any) -> None:
        return None


class SkippedProbabilities(KernelBase):
    """The backward leaves out probabilities below 1e-6."""

    def _probabilities(self, s: Array, lse: Array) -> Array:
        p = super()._probabilities(s, lse)
        return np.where(p < 1e-6, 0, p).astype(p.dtype)


class Unmasked(KernelBase):
    """The backward computes the scores again and does not mask them."""

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
        mask: Mask,  # noqa: ARG002
    ) -> tuple[Array, Array, Array]:
        return super()._backward(dout, q, k, v, out, lse, scale=scale, mask=None)


class NoScaleInDq(KernelBase):
    """The gradient of the queries is not scaled."""

    def _dq(self, ds: Array, k: Array, _scale: Any) -> Array:
        return super()._dq(ds, k, 1)


class NoScaleInDk(KernelBase):
    """The gradient of the keys is not scaled."""

    def _dk(self, ds: Array, q: Array, _scale: Any) -> Array:
        return super()._dk(ds, q, 1)


class NoScaleInGradients(NoScaleInDq, NoScaleInDk):
    """Neither the gradient of the queries nor that of the keys is scaled."""


class LastShardOfDq(KernelBase):
    """Every shard overwrites dq instead of adding to it."""

    variants = SHARDS

    def _add(self, _dq: Array, part: Array) -> Array:
        return part


class DpOverflows(KernelBase):
    """In float16, dout v^T is stored 256 times as large, and overflows where the values are."""

    def _score_gradients(self, p: Array, dp: Array, delta: Array) -> Array:
        if self.dtype == np.float16:
            dp = np.where(abs(256 * dp) < 65520, dp, np.inf).astype(dp.dtype)
        return super()._score_gradients(p, dp, delta)


BACKWARD: dict[str, type[KernelBase]] = {
    "delta missing": NoDelta,
    "delta added": AddedDelta,
    "delta of one shard": ShardDelta,
    "probabilities of one shard in the backward": ShardProbabilities,
    "backward by an lse that has lost log n": RoundedLse,
    "probabilities below 1e-6 skipped": SkippedProbabilities,
    "no mask in the backward": Unmasked,
    "dq not scaled": NoScaleInDq,
    "dk not scaled": NoScaleInDk,
    "dq and dk not scaled": NoScaleInGradients,
    "dq of the last shard": LastShardOfDq,
    "dp overflows in float16": DpOverflows,
}
