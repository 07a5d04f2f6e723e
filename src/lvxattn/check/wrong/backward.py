"""Wrong gradients."""

from typing import Any

import numpy as np

from lvxattn.check.case_arrays import Mask
from lvxattn.check.wrong.kernel_base import Array, KernelBase
from lvxattn.check.wrong.sums import SHARDS


class NoDelta(KernelBase, name="delta missing"):
    """The softmax's own gradient is missing: ds = p dp."""

    def _delta(self, dout: Array, out: Array) -> Array:
        return np.zeros_like(super()._delta(dout, out))


class AddedDelta(KernelBase, name="delta added"):
    """Delta is added instead of subtracted."""

    def _delta(self, dout: Array, out: Array) -> Array:
        return -super()._delta(dout, out)


class ShardDelta(KernelBase, name="delta of one shard"):
    """Delta comes from one shard's probabilities instead of all."""

    variants = SHARDS

    def _score_gradients(self, p: Array, dp: Array, _delta: Array) -> Array:
        return super()._score_gradients(p, dp, (p * dp).sum(axis=-1, keepdims=True))


class ShardProbabilities(KernelBase, name="probabilities of one shard in the backward"):
    """The backward normalizes the probabilities of every shard by itself."""

    variants = SHARDS

    def _probabilities(self, s: Array, _lse: Array) -> Array:
        p = self._exp(s - self._top(s))
        total = self._total(p)
        return np.asarray(p / np.where(total == 0, 1, total))


class RoundedLse(KernelBase, name="backward by an lse that has lost log n"):
    """The backward computes exp(s - lse), n times too large where lse has lost log n."""

    def _low(self, *_arguments: Any) -> None:
        return None


class SkippedProbabilities(KernelBase, name="probabilities below 1e-6 skipped"):
    """The backward skips probabilities below 1e-6."""

    def _probabilities(self, s: Array, lse: Array) -> Array:
        p = super()._probabilities(s, lse)
        return np.where(p < 1e-6, 0, p).astype(p.dtype)


class Unmasked(KernelBase, name="no mask in the backward"):
    """The backward recomputes the scores without masking them."""

    def _backward_mask(self, _mask: Mask) -> Mask:
        return None


class NoScaleInDq(KernelBase, name="dq not scaled"):
    """The gradient of the queries is not scaled."""

    def _dq(self, ds: Array, k: Array) -> Array:
        return self._dot(ds, k)


class NoScaleInDk(KernelBase, name="dk not scaled"):
    """The gradient of the keys is not scaled."""

    def _dk(self, ds: Array, q: Array) -> Array:
        return self._dot(ds.swapaxes(-1, -2), q)


class NoScaleInGradients(NoScaleInDq, NoScaleInDk, name="dq and dk not scaled"):
    """Neither the gradient of the queries nor that of the keys is scaled."""


class LastShardOfDq(KernelBase, name="dq of the last shard"):
    """Every shard overwrites dq instead of adding to it."""

    variants = SHARDS

    def _add(self, _dq: Array, part: Array) -> Array:
        return part


class DpOverflows(KernelBase, name="dp overflows in float16"):
    """In float16, dout v^T is stored 256 times as large, and overflows where the values are."""

    def _score_gradients(self, p: Array, dp: Array, delta: Array) -> Array:
        if self.dtype == np.float16:
            dp = np.where(abs(256 * dp) < 65520, dp, np.inf).astype(dp.dtype)
        return super()._score_gradients(p, dp, delta)
