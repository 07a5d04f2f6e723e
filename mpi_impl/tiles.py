"""How a block is cut into tiles, for the steps of `block_attention`."""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from lvxattn.common.masks import MaskView, tiles
from lvxattn.common.validation import accumulator, dtype_name

from .transport.device import array_module

Array = Any  # NumPy or CuPy

# Batch entry, key-value heads and query rows of one tile.
At = tuple[int, slice, slice]


class Tiles:
    """The tiles of one block: their sizes, and how arrays are loaded from and stored into it.

    The rows of the query heads that share a key-value head are stacked, so that a tile is one
    matrix product for each key-value head: (heads, G rows, D) by (heads, keys, D), G = H / H_KV.
    """

    def __init__(self, q: Array, k: Array, mask: MaskView) -> None:
        self.xp, self.mask = array_module(q), mask
        self.dtype = np.dtype(accumulator(dtype_name(q)))
        self.B, self.H, self.s_q, _ = q.shape
        self.H_KV, self.s_kv = k.shape[1:3]
        self.G = self.H // self.H_KV
        if self.xp is np:  # one head at a time; the scores fit a core's cache
            heads, rows, scores = 1, 512, 2**19
        else:  # all heads at once; enough work to fill a device
            heads, rows, scores = self.H_KV, 2048, 2**26
        self.tile_heads = heads
        self.tile_rows = max(1, min(self.s_q, rows // self.G))
        lines = heads * self.G * self.tile_rows
        # Keys of another dtype are copied: the copies fit, too, where there are fewer scores.
        copied = 0 if k.dtype == self.dtype else heads * k.shape[3]
        self.tile_keys = max(1, min(self.s_kv, max(1024, scores // max(lines, copied))))
        self.scratch = self.xp.empty((2, lines * self.tile_keys), self.dtype)

    def row_tiles(self) -> Iterator[At]:
        """Yield the batch entry, key-value heads and rows of every tile."""
        for b in range(self.B):
            for heads in tiles(self.H_KV, self.tile_heads):
                for rows in tiles(self.s_q, self.tile_rows):
                    yield b, heads, rows

    def key_tiles(self) -> Iterator[slice]:
        """Yield the keys of every tile."""
        return tiles(self.s_kv, self.tile_keys)

    def new_rows(self, *width: int) -> Array:
        """Return an array (B, H, s_q, *width) in the accumulator dtype, to be stored into."""
        return self.xp.empty((self.B, self.H, self.s_q, *width), self.dtype)

    def load(self, x: Array, at: At) -> Array:
        """Return a tile (heads, G rows, ...) of x (B, H, s_q, ...), in the accumulator dtype."""
        b, heads, rows = at
        tile = x[b, self._query_heads(heads), rows].astype(self.dtype)
        return tile.reshape(heads.stop - heads.start, -1, *x.shape[3:])  # (heads, G rows, ...)

    def store(self, x: Array, at: At, tile: Array) -> None:
        """Write a tile to where `load` reads it."""
        b, heads, rows = at
        view = x[b, self._query_heads(heads), rows]
        view[...] = tile.reshape(view.shape)  # (G heads, rows, ...)

    def load_keys(self, x: Array, at: At, keys: slice) -> Array:
        """Return a tile (heads, keys, ...) of keys or values; a copy only if the dtype differs."""
        return x[at[0], at[1], keys].astype(self.dtype, copy=False)

    def product(self, which: int, a: Array, b: Array) -> Array:
        """Return a b^T in scratch number `which`, which the next tile overwrites."""
        shape = (*a.shape[:2], b.shape[1])
        out = self.scratch[which, : prod(shape)].reshape(shape)  # (heads, G rows, keys)
        return self.xp.matmul(a, b.swapaxes(-1, -2), out=out)  # (heads, G rows, keys)

    def over_rows(self, a: Array, b: Array) -> Array:
        """Return a^T b.  For a single row a product is four times as fast as NumPy's matmul."""
        a = a.swapaxes(-1, -2)  # (heads, keys, G rows)
        return a * b if b.shape[1] == 1 else a @ b

    def scores(self, q_tile: Array, k_tile: Array, at: At, keys: slice) -> Array:
        """Return masked scores (heads, G rows, keys), in scratch number 0."""
        b, heads, rows = at
        scores = self.product(0, q_tile, k_tile)
        mask_tile = self.mask.tile(
            slice(b, b + 1), self._query_heads(heads), rows, keys, self.xp.arange
        )
        if mask_tile is not None:
            by_head = scores.reshape(-1, rows.stop - rows.start, scores.shape[2])
            # (G heads, rows, keys)
            if mask_tile.dtype == bool:
                self.xp.copyto(by_head, -self.xp.inf, where=~mask_tile[0])
            else:
                with np.errstate(over="ignore"):  # what overflows the accumulator is -inf
                    by_head += mask_tile[0].astype(self.dtype, copy=False)
        return scores

    def _query_heads(self, heads: slice) -> slice:
        return slice(heads.start * self.G, heads.stop * self.G)
