"""Masks that are misread, and rows that see nothing."""

import numpy as np

from lvxattn.check.case_arrays import Mask
from lvxattn.check.wrong.kernel_base import Array, KernelBase, Partial
from lvxattn.check.wrong.sums import SHARDS


class Ignored(KernelBase, name="mask ignored"):
    """The mask is ignored."""

    def _mask(self, _mask: Mask) -> Mask:
        return None


class Inverted(KernelBase, name="mask inverted"):
    """True is taken for hidden, as in PyTorch's nn.MultiheadAttention."""

    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        tile = super()._tile(mask, keys)
        return ~tile if tile is not None and tile.dtype == bool else tile


class BatchZero(KernelBase, name="batch 0's mask for all"):
    """Every batch entry is masked with the mask of the first."""

    def _mask(self, mask: Mask) -> Mask:
        if callable(mask):
            return lambda b, h, q_index, kv_index: mask(0 * b, h, q_index, kv_index)
        return None if mask is None else mask[:1]


class HeadZero(KernelBase, name="head 0's mask for all"):
    """Every head is masked with the mask of the first."""

    def _mask(self, mask: Mask) -> Mask:
        if callable(mask):
            return lambda b, h, q_index, kv_index: mask(b, 0 * h, q_index, kv_index)
        return None if mask is None else mask[:, :1]


class Flattened(KernelBase, name="mask for all heads flattened"):
    """Of a mask broadcast over heads, row b H + h modulo B is read instead of row b."""

    def _mask(self, mask: Mask) -> Mask:
        if not isinstance(mask, np.ndarray) or mask.shape[1] > 1 or mask.shape[2] == 1:
            return mask
        B, H = self.shape[:2]
        return np.asarray(mask[np.arange(B * H).reshape(B, H) % mask.shape[0], 0])


class KeyHeads(KernelBase, name="mask read by key-value head"):
    """Query heads that share keys are masked with the mask of their key-value head's number."""

    def _begin(self, q: Array, k: Array, scale: float) -> None:
        super()._begin(q, k, scale)
        self.of_head = self._kv_head(q.shape[1], k.shape[1])

    def _mask(self, mask: Mask) -> Mask:
        if callable(mask):
            of_head = self.of_head
            return lambda b, h, q_index, kv_index: mask(b, of_head[h], q_index, kv_index)
        if mask is None or mask.shape[1] == 1:
            return mask
        return mask[:, self.of_head]


class HeadStrideLost(KernelBase, name="mask of the first head for all where B is 1"):
    """Axes of length 1 are dropped, and with the batch's the stride of the next one."""

    def _mask(self, mask: Mask) -> Mask:
        return mask[:, :1] if isinstance(mask, np.ndarray) and self.shape[0] == 1 else mask


class FirstQueryOnly(KernelBase, name="mask for all queries read for the first alone"):
    """A mask with one row hides keys from the first query alone."""

    def _mask(self, mask: Mask) -> Mask:
        if not isinstance(mask, np.ndarray) or mask.shape[2] > 1 or mask.dtype != bool:
            return mask
        first = np.arange(self.shape[2])[:, None] == 0
        return np.asarray(mask | ~first)


class RowOfHeadZero(KernelBase, name="mask with one row read by batch entry alone"):
    """Of a mask (B, H, 1, S_KV), as of a padding mask, head 0's row is read."""

    def _mask(self, mask: Mask) -> Mask:
        return mask[:, :1] if isinstance(mask, np.ndarray) and mask.shape[2] == 1 else mask


class NextHead(KernelBase, name="mask for all batch entries read on"):
    """Of a mask (1, H, S_Q, S_KV), batch entry b begins b heads behind the first."""

    def _mask(self, mask: Mask) -> Mask:
        B, H = self.shape[:2]
        if not isinstance(mask, np.ndarray) or mask.shape[:2] != (1, H) or H == 1:
            return mask
        return np.asarray(mask[0, (np.arange(B)[:, None] + np.arange(H)) % H])


class NextPadding(KernelBase, name="padding of the next batch entry for the next query"):
    """Of a padding mask (B, 1, 1, S_KV), every query reads a row of its own."""

    def _mask(self, mask: Mask) -> Mask:
        B, _, S_Q, _ = self.shape
        if not isinstance(mask, np.ndarray) or mask.shape[:3] != (B, 1, 1):
            return mask
        rows = (np.arange(B)[:, None] + np.arange(S_Q)) % B
        return np.asarray(mask[rows, 0, 0][:, None])


class TwoDimensional(KernelBase, name="two-dimensional mask ignored"):
    """A mask without batch and heads is taken for none."""

    def _lift(self, mask: Mask) -> Mask:
        return None if isinstance(mask, np.ndarray) and mask.ndim == 2 else super()._lift(mask)


class Expanded(KernelBase, name="expanded mask read as dense"):
    """Heads of a mask are read one after another, even where all share the memory of the first."""

    def _lift(self, mask: Mask) -> Mask:
        expanded = isinstance(mask, np.ndarray) and mask.ndim == 4 and mask.strides[1] == 0
        if not isinstance(mask, np.ndarray) or not expanded or mask.shape[1] == 1:
            return super()._lift(mask)
        behind = np.zeros(mask.shape, mask.dtype)  # what lies there is undefined
        behind.reshape(-1)[: mask[:, 0].size] = mask[:, 0].reshape(-1)
        return behind


class LongestPadding(KernelBase, name="longest padding for all"):
    """Keys are cut off behind the longest batch entry, and the padding of the others is seen."""

    def _mask(self, mask: Mask) -> Mask:
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape[1:3] != (1, 1):
            return mask
        return np.asarray(mask.any(axis=0, keepdims=True))


class Causal(KernelBase, name="causal mask on top"):
    """A causal mask is added to the given one."""

    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        past = np.arange(self.shape[2])[:, None] >= np.arange(self.shape[3])[keys]
        tile = super()._tile(mask, keys)
        if tile is None:
            return past[None, None]
        return np.asarray(tile & past if tile.dtype == bool else np.where(past, tile, -np.inf))


class BoolAdded(KernelBase, name="bool mask added as 0 and 1"):
    """A bool mask is added to the scores as 0 and 1."""

    def _mask(self, mask: Mask) -> Mask:
        if isinstance(mask, np.ndarray) and mask.dtype == bool:
            return mask.astype(self.dtype)
        return mask


class FiniteIsInfinite(KernelBase, name="finite minimum taken for -inf"):
    """Keys with a number like -10,000 added are treated as hidden."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        s = super()._hide(s, mask)
        return np.where(s < -9000, -np.inf, s).astype(s.dtype)


class InfiniteIsFinite(KernelBase, name="-inf replaced by -10,000"):
    """An additive mask's -inf is replaced by -10,000."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        if mask is not None and mask.dtype != bool:
            mask = np.where(mask == -np.inf, -10000, mask.astype(s.dtype))
        return super()._hide(s, mask)


class ScaledBias(KernelBase, name="additive mask scaled"):
    """An additive mask is multiplied by the scale, as the scores are."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        if mask is not None and mask.dtype != bool:
            mask = mask.astype(s.dtype) * s.dtype.type(self.scale)
        return super()._hide(s, mask)


class CornersDecide(KernelBase, name="tile skipped by its first and last row"):
    """A tile is skipped if a mask hides it from its first and its last query."""

    variants = SHARDS

    def _hide(self, s: Array, mask: Array | None) -> Array:
        s = super()._hide(s, mask)
        if mask is None or mask.dtype != bool:
            return s
        seen = (s > -np.inf)[:, :, [0, -1]].any(axis=(2, 3), keepdims=True)
        return np.where(seen, s, -np.inf).astype(s.dtype)


class FewMasks(KernelBase, name="batch 0's mask where B H is 32 or more"):
    """Another path for many heads reads the first batch entry's mask."""

    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        tile = super()._tile(mask, keys)
        return tile[:1] if tile is not None and self.shape[0] * self.shape[1] >= 32 else tile


class FoldedIndices(KernelBase, name="callable asked with indices of grouped queries"):
    """Queries of heads that share keys are rows of one head, and a callable gets the row."""

    def _begin(self, q: Array, k: Array, scale: float) -> None:
        super()._begin(q, k, scale)
        self.group = q.shape[1] // k.shape[1]

    def _mask(self, mask: Mask) -> Mask:
        if not callable(mask):
            return mask
        group, S_Q = self.group, self.shape[2]
        return lambda b, h, q_index, kv_index: mask(b, h, q_index * group % S_Q, kv_index)


class OwnIndices(KernelBase, name="callable asked with a shard's own indices"):
    """A callable mask gets key indices that begin at 0 in every shard."""

    variants = SHARDS

    def _tile(self, mask: Mask, keys: slice) -> Array | None:
        if callable(mask):
            keys = slice(0, keys.stop - keys.start)
        return super()._tile(mask, keys)


class DeadNaN(KernelBase, name="dead rows NaN"):
    """A query that sees nothing divides 0 by 0."""

    variants = ({"lse": np.nan}, {"lse": -np.inf})

    def __init__(self, lse: float = np.nan) -> None:
        super().__init__()
        self.lse = lse

    def _join(self, parts: list[Partial], out: Array) -> Partial:
        out, lse = super()._join(parts, out)
        dead = lse == -np.inf
        return (
            np.where(dead[..., None], np.nan, out).astype(out.dtype),
            np.where(dead, self.lse, lse).astype(lse.dtype),
        )


class DeadUniform(KernelBase, name="dead rows uniform"):
    """Hidden keys get a large negative score, so a query that sees nothing attends to all alike."""

    def _hide(self, s: Array, mask: Array | None) -> Array:
        return np.maximum(super()._hide(s, mask), -1e30).astype(s.dtype)


class DeadLse(KernelBase, name="dead rows have an lse"):
    """The lse of a query that sees nothing is not -inf."""

    variants = ({"lse": 0.0}, {"lse": np.inf}, {"lse": -1e30}, {"lse": -10000.0})

    def __init__(self, lse: float = 0.0) -> None:
        super().__init__()
        self.lse = lse

    def _results(self, _q: Array, out: Array, lse: Array) -> Partial:
        return out, np.where(lse == -np.inf, self.lse, lse).astype(lse.dtype)

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return np.where(s == -np.inf, 0, super()._probabilities(s, lse))


class DeadBackward(KernelBase, name="dead rows NaN in the backward"):
    """The backward computes exp(s - lse) where both are -inf."""

    def _probabilities(self, s: Array, lse: Array) -> Array:
        return self._exp(s - lse[..., None].astype(s.dtype))


class DeadTile(KernelBase, name="tile with a dead row skipped"):
    """A tile with one query that sees nothing is skipped as a whole."""

    variants = SHARDS

    def _hide(self, s: Array, mask: Array | None) -> Array:
        s = super()._hide(s, mask)
        dead = (s == -np.inf).all(axis=3, keepdims=True).any(axis=2, keepdims=True)
        return np.where(dead, -np.inf, s).astype(s.dtype)


class AllHiddenIsNone(KernelBase, name="mask that hides all taken for none"):
    """A mask that hides everything is treated as no mask."""

    def _mask(self, mask: Mask) -> Mask:
        hides_all = isinstance(mask, np.ndarray) and mask.dtype == bool and not mask.any()
        return None if hides_all else mask
