"""Views of attention masks: the part of a rank's mask that applies to one block of queries.

A mask belongs to the rank that holds the keys: its columns are that rank's keys, its rows the
queries of all ranks.  A `MaskView` holds the position of a block in the whole problem, and returns
the tile of the mask on which a kernel works.  Nothing here depends on the library of the array.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lvxattn.common.rules import Rule, visible_parts
from lvxattn.common.validation import arange

Array = Any
MaskRule = Callable[[Array, Array, Array, Array], Array]


@dataclass(frozen=True)
class MaskView:
    """One block's view of a mask.

    Attributes
    ----------
    mask : None, array or callable
        As the user gave it: bool (True = may attend), additive float, or
        ``mask(b, h, q_index, kv_index) -> bool`` on broadcastable arrays of global indices.
    q_start, kv_start : int
        Global index of the block's first query and of its first key.
    column : int
        Index of the block's first key along the array mask's last axis.
    h_start : int
        Global index of the block's first head, for a callable; an array has the block's heads only.

    Examples
    --------
    The second half of 8 keys, causally masked:

    >>> import numpy as np
    >>> view = MaskView(lambda b, h, q_index, kv_index: q_index >= kv_index).from_key(4)
    >>> view.tile(slice(0, 1), slice(0, 1), slice(4, 6), slice(0, 4), np.arange)[0, 0].astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0]])
    """

    mask: Array | MaskRule | None
    q_start: int = 0
    kv_start: int = 0
    column: int = 0
    h_start: int = 0

    @staticmethod
    def of(mask: "MaskView | Array | MaskRule | None") -> "MaskView":
        """Return `mask` if it is a view, else a view of it that starts at index 0."""
        return mask if isinstance(mask, MaskView) else MaskView(mask)

    def from_key(self, start: int) -> "MaskView":
        """Return the view whose first key is this view's key `start`."""
        return replace(self, kv_start=self.kv_start + start, column=self.column + start)

    def parts(self, q: Array, k: Array) -> "Iterator[tuple[slice, slice, MaskView]]":
        """Yield the parts of a block that must be computed; all of it but for a `Rule`.

        Parameters
        ----------
        q : (B, H, s_q, D)
        k : (B, H_KV, s_kv, D)

        Yields
        ------
        rows, keys : slice
            Of the block.
        view : MaskView
            The mask of the part: an array, of one small part; or None where all of it is visible.
        """
        B, H, s_q, _ = q.shape
        s_kv = k.shape[2]
        if not isinstance(self.mask, Rule):
            yield slice(0, s_q), slice(0, s_kv), self
            return
        q_block = slice(self.q_start, self.q_start + s_q)
        kv_block = slice(self.kv_start, self.kv_start + s_kv)
        for its_q, its_kv, whole in visible_parts(self.mask, q_block, kv_block):
            rows = slice(its_q.start - self.q_start, its_q.stop - self.q_start)
            keys = slice(its_kv.start - self.kv_start, its_kv.stop - self.kv_start)
            seen = None if whole else self.tile(slice(0, B), slice(0, H), rows, keys, arange(q))
            yield rows, keys, MaskView(seen)

    def tile(
        self, batches: slice, heads: slice, rows: slice, keys: slice, arange: Callable[..., Array]
    ) -> Array | None:
        """Return one tile.

        Parameters
        ----------
        batches, heads, rows, keys : slice
            Of the block, with start and stop.
        arange : callable
            ``arange(start, stop)`` of the block's library, for the indices of a callable mask.

        Returns
        -------
        None, or an array of four axes that broadcasts to the tile's (B, H, s_q, s_kv)
            bool (True = may attend) or additive.

        Raises
        ------
        TypeError, ValueError
            A callable mask returned no bool array, or one that does not broadcast.
        """
        if self.mask is None:
            return None
        if callable(self.mask):
            visible = self.mask(
                arange(batches.start, batches.stop)[:, None, None, None],
                arange(self.h_start + heads.start, self.h_start + heads.stop)[:, None, None],
                arange(self.q_start + rows.start, self.q_start + rows.stop)[:, None],
                arange(self.kv_start + keys.start, self.kv_start + keys.stop),
            )
            if str(getattr(visible, "dtype", "")).removeprefix("torch.") != "bool":
                raise TypeError(
                    "mask: expected mask(b, h, q_index, kv_index) to return a bool array, "
                    f"got {getattr(visible, 'dtype', f'{visible!r:.40}, which is not an array')}"
                )
            shape = tuple(s.stop - s.start for s in (batches, heads, rows, keys))
            given = tuple(visible.shape)
            four = (1,) * (4 - len(given)) + given
            if len(given) > 4 or any(n not in (1, N) for n, N in zip(four, shape, strict=True)):
                raise ValueError(
                    "mask: expected mask(b, h, q_index, kv_index) to return what broadcasts to its "
                    f"indices' {shape}, got shape {given}"
                )
            return _four_axes(visible)
        mask = _four_axes(self.mask)
        q_start = 0 if mask.shape[2] == 1 else self.q_start
        return mask[
            _broadcast(mask.shape[0], batches),
            _broadcast(mask.shape[1], heads),
            _broadcast(mask.shape[2], slice(q_start + rows.start, q_start + rows.stop)),
            self.column + keys.start : self.column + keys.stop,
        ]


def tiles(length: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover ``range(length)``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _four_axes(mask: Array) -> Array:
    return mask.reshape((1,) * (4 - len(mask.shape)) + tuple(mask.shape))


def _broadcast(size: int, wanted: slice) -> slice:
    return slice(0, 1) if size == 1 else wanted
