"""Masks that are misread, and rows that see nothing."""

from typing import Any

import numpy as np

from lvxattn.check.masks import Mask
from lvxattn.check.wrong.kernel_base import Array, KernelBase, Shape
from lvxattn.check.wrong.sums import SHARDS


class Ignored(KernelBase):
    """The mask is not looked at."""

    def _mask(self, _mask: Mask, _shape: Shape) -> Mask:
        return None


class Inverted(KernelBase):
    """True is taken for hidden, as PyTorch's nn.MultiheadAttention has it."""

    def _tile(self, mask: Mask, shape: Shape, keys: slice) -> Array | None:
        tile = super()._tile(mask, shape, keys)
        return ~tile if tile is not None and tile.dtype == bool else tile


class BatchZero(KernelBase):
    """Every batch entry is masked with the mask of the first."""

    def _mask(self, mask: Mask, _shape: Shape) -> Mask:
        if callable(mask):
            return lambda b, h, q_index, kv_index: mask(0 * b, h, q_index, kv_index)
        return None if mask is None else mask[:1]


class HeadZero(KernelBase):
    """Every head is masked with the mask of the first."""

    def _mask(self, mask: Mask, _shape: Shape) -> Mask:
        if callable(mask):
            return lambda b, h, q_index, kv_index: mask(b, 0 * h, q_index, kv_index)
        return None if mask is None else mask[:, :1]


class Flattened(KernelBase):
    """Of a mask for all heads, row b H + h modulo B is read instead of row b."""

    def _mask(self, mask: Mask, shape: Shape) -> Mask:
        if not isinstance(mask, np.ndarray) or mask.shape[1] > 1 or mask.shape[2] == 1:
            return mask
        rows = np.arange(shape[0] * shape[1]).reshape(shape[:2]) % mask.shape[0]
        flattened: Array = mask[rows, 0]
        return flattened


class LongestPadding(KernelBase):
    """Keys are cut off behind the longest batch entry, and the padding of the others is seen."""

    def _mask(self, mask: Mask, _shape: Shape) -> Mask:
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape[1:3] != (1, 1):
            return mask
        return np.asarray(mask.any(axis=0, keepdims=True))


class Causal(KernelBase):
    """A causal mask is put on top of the given one."""

    def _tile(self, mask: Mask, shape: Shape, keys: slice) -> Array | None:
        past = np.arange(shape[2])[:, None] >= np.arange(shape[3])[keys]
        tile = super()._tile(mask, shape, keys)
        if tile is None:
            return past[None, None]
        joined: Array = tile & past if tile.dtype == bool else np.where(past, tile, -np.inf)
        return joined


class BoolAdded(KernelBase):
    """A bool mask is added to the scores as 0 and 1."""

    def _mask(self, mask: Mask, _shape: Shape) -> Mask:
        if isinstance(mask, np.ndarray) and mask.dtype == bool:
            return mask.astype(self.dtype)
        return mask


class FiniteIsInfinite(KernelBase):
    """Keys with a number like -10,000 added are taken for hidden."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        s = super()._hide(s, mask)
        return np.where(s < -9000, -np.inf, s).astype(s.dtype)


class InfiniteIsFinite(KernelBase):
    """An additive mask's -inf is replaced by -10,000."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        if mask is not None and mask.dtype != bool:
            mask = np.where(mask == -np.inf, -10000, mask.astype(s.dtype))
        return super()._hide(s, mask)


class ScaledBias(KernelBase):
    """An additive mask is multiplied by the scale as the scores are."""

    def _scale(self, scale: float, _D: int) -> Any:
        self.scale = scale
        return scale

    def _hide(self, s: Array, mask: Array | None) -> Array:
        if mask is not None and mask.dtype != bool:
            mask = mask.astype(s.dtype) * s.dtype.type(self.scale)
        return super()._hide(s, mask)


class OwnIndices(KernelBase):
    """A callable mask is asked with indices that begin at 0 in every shard."""

    variants = SHARDS

    def _tile(self, mask: Mask, shape: Shape, keys: slice) -> Array | None:
        if callable(mask):
            keys = slice(0, keys.stop - keys.start)
        return super()._tile(mask, shape, keys)


class DeadNaN(KernelBase):
    """A query that sees nothing divides 0 by 0."""

    variants = ({"lse": np.nan}, {"lse": -np.inf})

    def __init__(self, lse: float = np.nan) -> None:
        super().__init__()
        self.lse = lse

    def _join(self, parts: list[tuple[Array, Array]], out: Array) -> tuple[Array, Array]:
        out, lse = super()._join(parts, out)
        dead = lse == -np.inf
        return (
            np.where(dead[..., None], np.nan, out).astype(out.dtype),
            np.where(dead, self.lse, lse).astype(lse.dtype),
        )


class DeadUniform(KernelBase):
    """What is hidden gets a large negative score, so a query that sees nothing sees all alike."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        return np.maximum(super()._hide(s, mask), -1e30).astype(s.dtype)


class DeadLse(KernelBase):
    """A query that sees nothing gets an lse that is not -inf."""

    variants = ({"lse": 0.0}, {"lse": np.inf}, {"lse": -1e30}, {"lse": -10000.0})

    def __init__(self, lse: float = 0.0) -> None:
        super().__init__()
        self.lse = lse

    def _forward(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Mask
    ) -> tuple[Array, Array]:
        out, lse = super()._forward(q, k, v, scale=scale, mask=mask)
        return out, np.where(lse == -np.inf, self.lse, lse).astype(lse.dtype)

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return np.where(s == -np.inf, 0, super()._probabilities(s, lse))


class DeadBackward(KernelBase):
    """The backward takes exp(s - lse) where both are -inf."""

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return self._exp(s - lse[..., None].astype(s.dtype))


class DeadTile(KernelBase):
    """A tile with one query that sees nothing is left out as a whole."""

    variants = SHARDS

    def _hide(self, s: Array, mask: Array | None) -> Array:
        s = super()._hide(s, mask)
        dead = (s == -np.inf).all(axis=3, keepdims=True).any(axis=2, keepdims=True)
        return np.where(dead, -np.inf, s).astype(s.dtype)


class AllHiddenIsNone(KernelBase):
    """A mask that hides everything is taken for one that was not given."""

    def _mask(self, mask: Mask, _shape: Shape) -> Mask:
        hides_all = isinstance(mask, np.ndarray) and mask.dtype == bool and not mask.any()
        return None if hides_all else mask


MASKS: dict[str, type[KernelBase]] = {
    "mask ignored": Ignored,
    "mask inverted": Inverted,
    "batch 0's mask for all": BatchZero,
    "head 0's mask for all": HeadZero,
    "mask for all heads flattened": Flattened,
    "longest padding for all": LongestPadding,
    "causal mask on top": Causal,
    "bool mask added as 0 and 1": BoolAdded,
    "finite minimum taken for -inf": FiniteIsInfinite,
    "-inf replaced by -10,000": InfiniteIsFinite,
    "additive mask scaled": ScaledBias,
    "callable asked with a shard's own indices": OwnIndices,
    "dead rows NaN": DeadNaN,
    "dead rows uniform": DeadUniform,
    "dead rows have an lse": DeadLse,
    "dead rows NaN in the backward": DeadBackward,
    "tile with a dead row skipped": DeadTile,
    "mask that hides all taken for none": AllHiddenIsNone,
}
