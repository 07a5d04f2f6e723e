"""Wrong sums over the keys: keys missing or counted twice, wrong merges of shards, wrong lse."""

from math import log

import numpy as np

from lvxattn.check.wrong.kernel_base import Array, KernelBase, Partial

SHARDS = tuple({"shards": shards} for shards in (4, 2, 3, 8))


class PhantomKey(KernelBase, name="phantom key"):
    """The running lse starts at 0, which is one more key, of score 0 and value 0."""

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        return super()._join([(out, np.zeros((*out.shape[:3], 2), out.dtype)), *parts], out)


class PhantomKeys(KernelBase, name="phantom key in every shard"):
    """Every shard's running sum starts at 1 instead of 0."""

    variants = ({"shards": 4}, {"shards": 1}, {"shards": 2}, {"shards": 3}, {"shards": 8})

    def _total(self, p: Array) -> Array:
        return super()._total(p) + 1


class LastShardDropped(KernelBase, name="last shard dropped"):
    """The loop over the shards ends one too early."""

    variants = SHARDS

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV)[:-1]


class LastKeyDropped(KernelBase, name="last key dropped"):
    """The loop over the keys ends one too early."""

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV - 1)


class LastTileDropped(KernelBase, name="last partial tile of keys dropped"):
    """Keys are taken in tiles of 32, and the last tile is dropped unless it is full."""

    variants = tuple({"tile": tile} for tile in (32, 8, 16, 64, 128))

    def __init__(self, tile: int = 32) -> None:
        super().__init__()
        self.tile = tile

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV - S_KV % min(self.tile, S_KV))


class Capacity(KernelBase, name="keys beyond 4,096 dropped"):
    """A buffer holds 4,096 keys, and those behind are dropped."""

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(min(S_KV, 4096))


class AveragedSplits(KernelBase, name="splits of a single query averaged"):
    """For a single query the keys are split, and the results of the splits averaged."""

    variants = SHARDS

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        joined, lse = super()._join(parts, out)
        return (joined if out.shape[2] > 1 else _mean(parts)), lse


class OneKey(KernelBase, name="lse of a single key is 0"):
    """A single key needs no softmax, so its lse is left at 0."""

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        return out, (np.zeros_like(lse) if self.shape[3] == 1 else lse)


class UnweightedMerge(KernelBase, name="unweighted merge"):
    """Shards' results are averaged, without weights from lse."""

    variants = SHARDS

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        return _mean(parts), super()._join(parts, out)[1]


class MergeWithoutMaximum(KernelBase, name="merge without maximum"):
    """Shards are merged with weights exp(lse), which overflow and underflow."""

    def _join(self, parts: list[Partial], _out: Array) -> Partial:
        weights = [np.exp(lse.sum(axis=-1))[..., None] for _, lse in parts]
        total = np.sum(weights, axis=0)
        summed = np.sum([weight * x for weight, (x, _) in zip(weights, parts, strict=True)], axis=0)
        return summed / np.where(total == 0, 1, total), np.log(total)[..., 0]


class LseWeights(KernelBase, name="merge weights that do not sum to 1"):
    """Shards weigh exp(lse_a - lse), which sum to more than 1 where lse has lost log n."""

    variants = SHARDS

    def _merge(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> Partial:
        lse_a, lse_b = lse_a.sum(axis=-1, keepdims=True), lse_b.sum(axis=-1, keepdims=True)
        lse = np.logaddexp(lse_a, lse_b)
        base = np.where(lse == -np.inf, 0, lse)
        out = np.exp(lse_a - base) * out_a + np.exp(lse_b - base) * out_b
        return out, np.concatenate([np.zeros_like(lse), lse], axis=-1)


class OneNumber(KernelBase, name="merge by an lse that has lost log n"):
    """Shards are merged by lse alone: where it has lost log n, they count alike, long or short."""

    variants = tuple({"shards": shards} for shards in (4, 2, 3, 5, 8))

    def _attend(self, s: Array, v: Array) -> Partial:
        out, lse = super()._attend(s, v)
        seen = lse[..., 1:] > -np.inf
        lse = np.where(seen, lse.sum(axis=-1, keepdims=True), -np.inf)
        return out, np.concatenate([lse, np.where(seen, 0, -np.inf)], axis=-1).astype(s.dtype)

    def _merge(self, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> Partial:
        out, lse = super()._merge(out_a, lse_a, out_b, lse_b)
        seen = lse[..., 1:] > -np.inf
        one = np.where(seen, lse.sum(axis=-1, keepdims=True), -np.inf)
        return out, np.concatenate([one, np.where(seen, 0, -np.inf)], axis=-1).astype(out.dtype)


class LastLse(KernelBase, name="lse of the last shard"):
    """The lse returned is the last shard's, not that of all."""

    variants = SHARDS

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        return super()._join(parts, out)[0], parts[-1][1].sum(axis=-1)


class EmptyShard(KernelBase, name="an empty shard has lse 0"):
    """A shard without keys has lse 0 instead of -inf."""

    variants = tuple({"shards": shards} for shards in (4, 5, 8, 16, 64))

    def _attend(self, s: Array, v: Array) -> Partial:
        out, lse = super()._attend(s, v)
        return out, (lse if s.shape[3] else np.zeros_like(lse))


class BlindShard(KernelBase, name="a shard that sees nothing has lse 0"):
    """A query that sees no key of a shard gets lse 0 for it instead of -inf."""

    variants = SHARDS

    def _attend(self, s: Array, v: Array) -> Partial:
        out, lse = super()._attend(s, v)
        blind = lse[..., 1:] == -np.inf
        return out, (np.where(blind, 0, lse).astype(lse.dtype) if s.shape[3] else lse)


class NeighbourBlock(KernelBase, name="neighbour's block returned"):
    """After the last hop of a ring every rank returns the results of its neighbour's queries."""

    variants = SHARDS

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        joined, lse = super()._join(parts, out)
        block = -(-out.shape[2] // self.shards)
        return np.roll(joined, -block, axis=2), np.roll(lse, -block, axis=2)


class LseBase2(KernelBase, name="lse in base 2"):
    """The lse is left in base 2, in which the exponentials are taken."""

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        return out, (lse / log(2)).astype(lse.dtype)

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return super()._probabilities(s, lse * log(2))


class _KnowsMaximum(KernelBase):
    """Keeps the largest score of every query."""

    def _begin(self, q: Array, k: Array, scale: float) -> None:
        super()._begin(q, k, scale)
        self.top = np.full((*q.shape[:3], 1), -np.inf)

    def _attend(self, s: Array, v: Array) -> Partial:
        self.top = np.maximum(self.top, s.max(axis=-1, keepdims=True, initial=-np.inf))
        return super()._attend(s, v)


class LseWithoutMaximum(_KnowsMaximum, name="lse without the maximum"):
    """The lse is the log of the sum: the maximum, subtracted before, is not added back."""

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        out, lse = super()._join(parts, out)
        top = np.where(self.top == -np.inf, 0, self.top)[..., 0]
        return out, (lse - top).astype(lse.dtype)


class NotNormalized(_KnowsMaximum, name="out not divided by the sum"):
    """The weighted sum of the values is not divided by the sum of the weights."""

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        out, lse = super()._join(parts, out)
        return np.where(lse == -np.inf, 0, np.exp(lse - self.top[..., 0]))[..., None] * out, lse


class AddedToTheSum(KernelBase, name="1e-6 added to the sum"):
    """1e-6 is added to the sum of the probabilities, to avoid a division by 0."""

    def _total(self, p: Array) -> Array:
        total = super()._total(p)
        return np.where(total == 0, total, total + 1e-6).astype(p.dtype)


def _mean(parts: list[Partial]) -> Array:
    return np.asarray(np.mean([out for out, _ in parts], axis=0))
