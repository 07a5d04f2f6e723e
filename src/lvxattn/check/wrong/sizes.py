"""Sizes that a kernel is not made for: each of these is right for all others."""

from typing import Any

import numpy as np

from lvxattn.check.case_arrays import Mask
from lvxattn.check.wrong.kernel_base import Array, Gradients, KernelBase, Partial


class ManyBatches(KernelBase, name="batch entries beyond the fourth read the first ones'"):
    """Keys are found by the number of the batch entry modulo 4."""

    variants = ({"most": 4}, {"most": 2}, {"most": 3}, {"most": 8})

    def __init__(self, most: int = 4) -> None:
        super().__init__()
        self.most = most

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        entries = np.arange(q.shape[0]) % self.most
        return q, k[entries], v[entries]


class ManyHeads(KernelBase, name="heads beyond the sixteenth read the first ones'"):
    """Queries are found by the number of the head modulo 16."""

    variants = ({"most": 16}, {"most": 8}, {"most": 12})

    def __init__(self, most: int = 16) -> None:
        super().__init__()
        self.most = most

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        return q[:, np.arange(q.shape[1]) % self.most], k, v


class ManyKeyHeads(KernelBase, name="key-value heads beyond the eighth read the first ones'"):
    """Keys and values are found by the number of their head modulo 8."""

    variants = ({"most": 8}, {"most": 4})

    def __init__(self, most: int = 8) -> None:
        super().__init__()
        self.most = most

    def _kv_head(self, H: int, H_KV: int) -> Array:
        return super()._kv_head(H, H_KV) % self.most


class WideHeads(KernelBase, name="components beyond the 64th dropped"):
    """Scores are summed over the first 64 components of q and k."""

    variants = tuple({"most": most} for most in (64, 32, 80, 128))

    def __init__(self, most: int = 64) -> None:
        super().__init__()
        self.most = most

    def _scores(self, q: Array, k: Array) -> Array:
        return super()._scores(q[..., : self.most], k[..., : self.most])


class LargeGroups(KernelBase, name="groups of more than two heads"):
    """At most two query heads read each key-value head; those left over start again."""

    def _kv_head(self, H: int, H_KV: int) -> Array:
        return np.asarray(np.arange(H) // min(2, H // H_KV) % H_KV)


class NarrowValues(KernelBase, name="rows of v as long as D"):
    """Where D_V is less than D, rows of v are read D apart."""

    def _arguments(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = super()._arguments(q, k, v)
        (B, H, S_KV, D_V), D = v.shape, q.shape[3]
        if D_V >= D:
            return q, k, v
        behind = np.zeros((B, H, S_KV * D), v.dtype)  # what lies there is undefined
        behind[..., : S_KV * D_V] = v.reshape(B, H, -1)
        return q, k, behind.reshape(B, H, S_KV, D)[..., :D_V]


class WideValues(KernelBase, name="columns of v beyond D lost"):
    """Values are taken to be as long as keys, and their further columns left at 0."""

    def _results(self, q: Array, out: Array, lse: Array) -> Partial:
        out[..., q.shape[3] :] = 0
        return out, lse


class WideValueGradients(KernelBase, name="columns of dv beyond D lost"):
    """The columns of dv beyond D are left at 0."""

    def _gradients(self, dq: Array, dk: Array, dv: Array) -> Gradients:
        dv[..., dq.shape[3] :] = 0
        return dq, dk, dv


class SquareIsCausal(KernelBase, name="causal where S_Q is S_KV"):
    """As many queries as keys are taken for self-attention."""

    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        tile = super()._tile(mask, keys)
        _, _, S_Q, S_KV = self.shape
        if S_Q != S_KV:
            return tile
        past = np.arange(S_Q)[:, None] >= np.arange(S_KV)[keys]
        if tile is None:
            return past[None, None]
        return np.asarray(tile & past if tile.dtype == bool else np.where(past, tile, -np.inf))


class ManyQueriesFewKeys(KernelBase, name="queries beyond the 128th left out where keys are few"):
    """With fewer than 32 keys, one tile of 128 queries is computed."""

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        if self.shape[3] < 32:
            out[:, :, 128:] = 0
            lse[:, :, 128:] = -np.inf
        return out, lse


class LastQueriesDropped(KernelBase, name="last partial tile of queries dropped"):
    """Queries are taken in tiles of 8, and what is left over behind whole ones is left out."""

    variants = tuple({"tile": tile} for tile in (8, 16, 32, 64))

    def __init__(self, tile: int = 8) -> None:
        super().__init__()
        self.tile = tile

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        if whole := self.shape[2] // self.tile * self.tile:
            out[:, :, whole:] = 0
            lse[:, :, whole:] = -np.inf
        return out, lse


class TailOfOne(KernelBase, name="tail of one key lost"):
    """A single key behind whole tiles of 128 is left out."""

    variants = tuple({"tile": tile} for tile in (128, 64, 32, 16))

    def __init__(self, tile: int = 128) -> None:
        super().__init__()
        self.tile = tile

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV - (self.tile < S_KV and S_KV % self.tile == 1))


class WholeTiles(KernelBase, name="last key lost where tiles are whole"):
    """Where tiles of 64 divide the keys, the last key is taken for padding."""

    variants = ({"tile": 64}, {"tile": 128}, {"tile": 32})

    def __init__(self, tile: int = 64) -> None:
        super().__init__()
        self.tile = tile

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(S_KV - (S_KV % self.tile == 0))


class ShortIndex(KernelBase, name="key index in 16 bits"):
    """Keys beyond 32,767 have negative indices, and are left out."""

    def _cut(self, S_KV: int) -> list[slice]:
        return super()._cut(min(S_KV, 2**15))


class DecodeWithoutMask(KernelBase, name="mask ignored for a single query"):
    """A single query is the last one, and sees all keys."""

    def _mask(self, mask: Mask) -> Mask:
        return None if self.shape[2] == 1 else mask


class DecodeSplits(KernelBase, name="last partial split of a single query dropped"):
    """For a single query, keys are taken in splits of 16, and what is left over is dropped."""

    variants = ({"split": 16}, {"split": 8}, {"split": 32})

    def __init__(self, split: int = 16) -> None:
        super().__init__()
        self.split = split

    def _cut(self, S_KV: int) -> list[slice]:
        whole = S_KV // self.split * self.split
        return super()._cut(whole if self.shape[2] == 1 and whole else S_KV)


class PositiveScale(KernelBase, name="negative scale taken as positive"):
    """The scale is the square of the square root that q and k are each multiplied by."""

    def _scale(self, _D: int) -> Any:
        return abs(self.scale)


class RawScores(KernelBase, name="raw scores overflow in half precision"):
    """Scores are stored in fp16 before they are scaled."""

    def _scores(self, q: Array, k: Array) -> Array:
        s = super()._scores(q, k)
        if self.dtype != np.float16:
            return s
        return np.where(abs(s) > 65504, np.copysign(np.inf, s), s).astype(s.dtype)


class WholeLargeTiles(KernelBase, name="last key lost where keys are whole tiles of 256"):
    """The last tile of 256 is taken for a partial one of 0 keys but one."""

    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        tile = super()._tile(mask, keys)
        if self.shape[3] % 256:
            return tile
        seen = np.arange(self.shape[3])[keys] < self.shape[3] - 1
        if tile is None:
            return seen[None, None, None]
        return np.asarray(tile & seen if tile.dtype == bool else np.where(seen, tile, -np.inf))


class LastRowOfDq(KernelBase, name="dq of the last query lost behind whole tiles"):
    """The last tile of queries, of 64, is left out of dq if it has one row."""

    def _gradients(self, dq: Array, dk: Array, dv: Array) -> Gradients:
        if dq.shape[2] > 64 and dq.shape[2] % 64 == 1:
            dq[:, :, -1] = 0
        return dq, dk, dv


class WideSingleQuery(KernelBase, name="components beyond the 64th dropped for a single query"):
    """A single query has a kernel of its own, for at most 64 components."""

    def _scores(self, q: Array, k: Array) -> Array:
        most = 64 if self.shape[2] == 1 else None
        return super()._scores(q[..., :most], k[..., :most])
