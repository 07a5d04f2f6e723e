"""Wrong sums over the keys: keys that are left out or counted in, shards merged wrongly, lse."""

from math import log

import numpy as np

from lvxattn.check.masks import Mask
from lvxattn.check.wrong.kernel_base import Array, KernelBase

SHARDS = tuple({"shards": shards} for shards in (4, 2, 3, 8))


class PhantomKey(KernelBase):
    """The running lse starts at 0, which is one more key, of score 0 and value 0."""

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        return super()._join([(out, np.zeros((*out.shape[:3], 2), out.dtype)), *parts], out)


class PhantomKeys(KernelBase):
    """Every shard's running sum starts at 1 instead of 0."""

    variants = ({"shards": 4}, {"shards": 1}, {"shards": 2}, {"shards": 3}, {"shards": 8})

    def _total(self, p: Array) -> Array:
        return super()._total(p) + 1


class LastShardDropped(KernelBase):
    """The loop over the shards ends one too early."""

    variants = SHARDS

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV)[:-1]


class LastKeyDropped(KernelBase):
    """The loop over the keys ends one too early."""

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV - 1)


class LastTileDropped(KernelBase):
    """Keys are taken in tiles of 32, and those that do not fill one are left out."""

    variants = tuple({"tile": tile} for tile in (32, 8, 16, 64, 128))

    def __init__(self, tile: int = 32) -> None:
        super().__init__()
        self.tile = tile

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV - S_KV % min(self.tile, S_KV))


class Capacity(KernelBase):
    """A buffer holds 4,096 keys, and those behind are left out."""

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(min(S_KV, 4096))


class AveragedSplits(KernelBase):
    """For a single query the keys are split, and the results of the splits averaged."""

    variants = SHARDS

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        joined, lse = super()._join(parts, out)
        return (joined if out.shape[2] > 1 else _mean(parts)), lse


class OneKey(KernelBase):
    """A single key needs no softmax, so its lse is left at 0."""

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        out, lse = super()._forward(q, k, v, scale=scale, mask=mask)
        return out, (np.zeros_like(lse) if k.shape[2] == 1 else lse)


class UnweightedMerge(KernelBase):
    """Shards' results are averaged, whatever their lse."""

    variants = SHARDS

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        return _mean(parts), super()._join(parts, out)[1]


class MergeWithoutMaximum(KernelBase):
    """Shards are merged with weights exp(lse), which overflow and underflow."""

    def _join(self, parts: list[tuple[Array, Array]], _out: Array) -> tuple[Array, Array]:
        weights = [np.exp(lse.sum(axis=-1))[..., None] for _, lse in parts]
        total = np.sum(weights, axis=0)
        summed = np.sum([weight * x for weight, (x, _) in zip(weights, parts, strict=True)], axis=0)
        return summed / np.where(total == 0, 1, total), np.log(total)[..., 0]


class LseWeights(KernelBase):
    """Shards weigh exp(lse_a - lse), which sum to more than 1 where lse has lost log n."""

    variants = SHARDS

    def _merge(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
        lse_a, lse_b = lse_a.sum(axis=-1, keepdims=True), lse_b.sum(axis=-1, keepdims=True)
        lse = np.logaddexp(lse_a, lse_b)
        base = np.where(lse == -np.inf, 0, lse)
        out = np.exp(lse_a - base) * out_a + np.exp(lse_b - base) * out_b
        return out, np.concatenate([np.zeros_like(lse), lse], axis=-1)


class OneNumber(KernelBase):
    """Shards are merged by lse alone: where it has lost log n, they count alike, long or short."""

    variants = tuple({"shards": shards} for shards in (4, 2, 3, 5, 8))

    def _attend(self, s: Array, v: Array) -> tuple[Array, Array]:
        out, lse = super()._attend(s, v)
        seen = lse[..., 1:] > -np.inf
        lse = np.where(seen, lse.sum(axis=-1, keepdims=True), -np.inf)
        return out, np.concatenate([lse, np.where(seen, 0, -np.inf)], axis=-1).astype(s.dtype)

    def _merge(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
        out, lse = super()._merge(out_a, lse_a, out_b, lse_b)
        seen = lse[..., 1:] > -np.inf
        one = np.where(seen, lse.sum(axis=-1, keepdims=True), -np.inf)
        return out, np.concatenate([one, np.where(seen, 0, -np.inf)], axis=-1).astype(out.dtype)


class LastLse(KernelBase):
    """The lse that is returned is the last shard's, not that of all."""

    variants = SHARDS

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        return super()._join(parts, out)[0], parts[-1][1].sum(axis=-1)


class EmptyShard(KernelBase):
    """A shard without keys has lse 0 instead of -inf."""

    variants = tuple({"shards": shards} for shards in (4, 5, 8, 16, 64))

    def _attend(self, s: Array, v: Array) -> tuple[Array, Array]:
        out, lse = super()._attend(s, v)
        return out, (lse if s.shape[3] else np.zeros_like(lse))


class BlindShard(KernelBase):
    """A query that sees nothing of a shard gets lse 0 for it instead of -inf."""

    variants = SHARDS

    def _attend(self, s: Array, v: Array) -> tuple[Array, Array]:
        out, lse = super()._attend(s, v)
        blind = lse[..., 1:] == -np.inf
        return out, (np.where(blind, 0, lse).astype(lse.dtype) if s.shape[3] else lse)


class NeighbourBlock(KernelBase):
    """After the last hop of a ring every rank returns the results of its neighbour's queries."""

    variants = SHARDS

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        joined, lse = super()._join(parts, out)
        block = -(-out.shape[2] // self.shards)
        return np.roll(joined, -block, axis=2), np.roll(lse, -block, axis=2)


class LseBase2(KernelBase):
    """The lse is left in base 2, in which the exponentials are taken."""

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        out, lse = super()._forward(q, k, v, scale=scale, mask=mask)
        return out, (lse / log(2)).astype(lse.dtype)

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return super()._probabilities(s, lse * log(2))


class _KnowsMaximum(KernelBase):
    """Keeps the largest score of every query."""

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        self.top = np.full((*q.shape[:3], 1), -np.inf)
        return super()._forward(q, k, v, scale=scale, mask=mask)

    def _attend(self, s: Array, v: Array) -> tuple[Array, Array]:
        self.top = np.maximum(self.top, s.max(axis=-1, keepdims=True, initial=-np.inf))
        return super()._attend(s, v)


class LseWithoutMaximum(_KnowsMaximum):
    """The lse is the log of the sum: the maximum, subtracted before, is not added again."""

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        out, lse = super()._join(parts, out)
        top = np.where(self.top == -np.inf, 0, self.top)[..., 0]
        return out, (lse - top).astype(lse.dtype)


class NotNormalized(_KnowsMaximum):
    """The weighted sum of the values is not divided by the sum of the weights."""

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        out, lse = super()._join(parts, out)
        return np.where(lse == -np.inf, 0, np.exp(lse - self.top[..., 0]))[..., None] * out, lse


class AddedToTheSum(KernelBase):
    """1e-6 is added to the sum of the probabilities, so that nothing is divided by 0."""

    def _total(self, p: Array) -> Array:
        total = super()._total(p)
        return np.where(total == 0, total, total + 1e-6).astype(p.dtype)


def _mean(parts: list[tuple[Array, Array]]) -> Array:
    mean: Array = np.mean([out for out, _ in parts], axis=0)
    return mean


SUMS: dict[str, type[KernelBase]] = {
    "phantom key": PhantomKey,
    "phantom key in every shard": PhantomKeys,
    "last shard dropped": LastShardDropped,
    "last key dropped": LastKeyDropped,
    "last partial tile of keys dropped": LastTileDropped,
    "keys beyond 4,096 dropped": Capacity,
    "splits of a single query averaged": AveragedSplits,
    "lse of a single key is 0": OneKey,
    "unweighted merge": UnweightedMerge,
    "merge without maximum": MergeWithoutMaximum,
    "merge weights that do not sum to 1": LseWeights,
    "merge by an lse that has lost log n": OneNumber,
    "lse of the last shard": LastLse,
    "an empty shard has lse 0": EmptyShard,
    "a shard that sees nothing has lse 0": BlindShard,
    "neighbour's block returned": NeighbourBlock,
    "lse in base 2": LseBase2,
    "lse without the maximum": LseWithoutMaximum,
    "out not divided by the sum": NotNormalized,
    "1e-6 added to the sum": AddedToTheSum,
}
