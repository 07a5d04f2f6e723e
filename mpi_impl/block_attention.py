r"""One block of queries against one rank's keys.

Keys are taken tile by tile.  A tile gives attention over its keys alone, and `merge_partials` joins
it with the tiles before; scores are never kept for more than one tile.

    s = scale q k^T + mask       p = exp(s - top)      top = rowmax s
    out = p v / total            total = rowsum p      lse = top + log total

The backward needs no such care: with lse over all keys of all ranks known, every tile's
probabilities are what they are in the whole,

    p  = exp(s - lse)           dv = p^T dout
    ds = p (dout v^T - delta)   dq = scale ds k    dk = scale ds^T q

so its sums over tiles, blocks and ranks are plain sums.  What lse has lost in rounding, `low`, is a
factor exp(-low) of every p of a row.  dout and delta have it instead, to which all gradients are
proportional: nothing more travels.

Equations: arXiv:2307.08691, algorithms 1 and 2.

The elementwise steps between two matrix products are done in place on a tile that stays in a core's
cache (NumPy) or fills the device (CuPy).  Between tiles the caller's `progress` lets MPI work.

For CuPy there is another way, `kernels/`: the same tiles in one kernel on tensor cores, which takes
over where it can.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np

from lvxattn.common.masks import MaskRule, MaskView, tiles
from lvxattn.common.validation import accumulator, dtype_name

from . import kernels
from .merge import lse_of, merge_partials
from .transport.device import array_module

Array = Any  # NumPy or CuPy


def block_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    mask: MaskView | Array | MaskRule | None = None,
    progress: Callable[[], None] = lambda: None,
    kernel: str = "auto",
) -> tuple[Array, Array]:
    """Attend from a block of queries to one rank's keys.  Not collective.

    Parameters
    ----------
    q : (B, H, s_q, D)
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
    scale : float
    mask : optional
        A mask over this block, or the view that `Layout.view` gives of a rank's mask.
    progress : callable
        Called between tiles.
    kernel : str
        ``"tiles"``: these steps, which can do everything; ``"cuda"``: those of `kernels`;
        ``"auto"``: what ``LVXATTN_KERNEL`` says or, unless it is set, the latter where they can.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    lse : (B, H, s_q), accumulator dtype
        Natural log; (0, -inf) where a query may attend to none of the keys.

    Raises
    ------
    ValueError
        `kernel`, or the variable, is none of these, or cannot do this.
    RuntimeError
        ``"cuda"`` is asked for, and cannot be compiled.
    """
    out, top, total = partial_attention(
        q, k, v, scale=scale, mask=mask, progress=progress, kernel=kernel
    )
    return out, lse_of(top, total)


def partial_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    mask: MaskView | Array | MaskRule | None = None,
    progress: Callable[[], None] = lambda: None,
    kernel: str = "auto",
) -> tuple[Array, Array, Array]:
    """Do what `block_attention` does, with lse as the pair that `merge_partials` joins.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    top, total : (B, H, s_q), accumulator dtype
        The largest score, and the sum of exponentiated scores divided by exp(top); (0, -inf, 0)
        where a query may attend to none of the keys.  Of `kernels`: lse and 1.
    """
    if kernels.choose(q, k, v, MaskView.of(mask).mask, kernel).kernel == "cuda":
        xp = array_module(q)
        out, lse = kernels.forward(xp, q, k, v, scale=float(scale))
        progress()
        return out, lse, xp.ones_like(lse)
    work = _Tiles(q, k, MaskView.of(mask))
    xp = work.xp
    out, top, total = work.new_rows(v.shape[3]), work.new_rows(), work.new_rows()
    for at in work.row_tiles():
        q_tile = work.load(q, at) * float(scale)
        out_tile = xp.zeros((*q_tile.shape[:2], v.shape[3]), work.dtype)
        top_tile = xp.full(q_tile.shape[:2], -xp.inf, work.dtype)
        total_tile = xp.zeros(q_tile.shape[:2], work.dtype)
        for keys in work.key_tiles():
            # 1. Scores, with -inf where a query may not look.
            p = work.scores(q_tile, work.load_keys(k, at, keys), at, keys)
            # 2. Softmax over this tile alone.  Where a row sees nothing: 0 instead of -inf - -inf.
            row_max = p.max(axis=-1)
            base = xp.where(row_max == -xp.inf, 0.0, row_max)
            p -= base[..., None]
            xp.exp(p, out=p)
            row_sum = p.sum(axis=-1)
            part = p @ work.load_keys(v, at, keys)
            part /= xp.where(row_sum == 0, 1.0, row_sum)[..., None]
            # 3. Join it with the tiles before.
            out_tile, top_tile, total_tile = merge_partials(
                out_tile, top_tile, total_tile, part, row_max, row_sum
            )
            progress()
        for x, tile in ((out, out_tile), (top, top_tile), (total, total_tile)):
            work.store(x, at, tile)
    return out, top, total


def block_attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    dk: Array,
    dv: Array,
    *,
    scale: float,
    mask: MaskView | Array | MaskRule | None = None,
    progress: Callable[[], None] = lambda: None,
    kernel: str = "auto",
) -> Array:
    """Differentiate `block_attention` given lse and delta over all keys of all ranks.

    Not collective.  Adds this block's share to dk and dv in place.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
    q, k, v, scale, mask, progress, kernel
        As given to `block_attention`.
    lse : (B, H, s_q)
        Over all keys.
    delta : (B, H, s_q)
        ``rowsum(dout * out) - dlse``, out over all keys.
    dk, dv : shaped as k, v
        Added to in place.  In the accumulator dtype, or k's if nothing else is added to them: this
        block's sums are in the former, and then rounded once.

    Returns
    -------
    dq : (B, H, s_q, D), accumulator dtype
        The share of these keys.
    """
    if kernels.choose(q, k, v, MaskView.of(mask).mask, kernel).kernel == "cuda":
        xp = array_module(q)
        dq = kernels.backward(xp, dout, q, k, v, lse, delta, dk, dv, scale=float(scale))
        progress()
        return dq
    work = _Tiles(q, k, MaskView.of(mask))
    xp = work.xp
    dq = work.new_rows(q.shape[3])
    sums = [x if x.dtype == work.dtype else xp.zeros(x.shape, work.dtype) for x in (dk, dv)]
    dk_sum, dv_sum = sums
    for at in work.row_tiles():
        q_tile = work.load(q, at) * float(scale)
        dout_tile, lse_tile, delta_tile = (work.load(x, at) for x in (dout, lse, delta))
        dq_tile = xp.zeros_like(q_tile)
        base = xp.where(lse_tile == -xp.inf, 0.0, lse_tile)
        for keys in work.key_tiles():
            k_tile, v_tile = work.load_keys(k, at, keys), work.load_keys(v, at, keys)
            # 1. The probabilities that these keys have among all keys.
            p = work.scores(q_tile, k_tile, at, keys)
            p -= base[..., None]
            xp.exp(p, out=p)
            # 2. Their gradients, and those of the scores.
            ds = work.product(1, dout_tile, v_tile)
            ds -= delta_tile[..., None]
            ds *= p
            # 3. Plain sums; the heads of a group share their key-value head.
            dv_sum[at[0], at[1], keys] += work.over_rows(p, dout_tile)
            dk_sum[at[0], at[1], keys] += work.over_rows(ds, q_tile)
            dq_tile += ds @ k_tile
            progress()
        work.store(dq, at, dq_tile * float(scale))
    for x, share in zip((dk, dv), sums, strict=True):
        if share is not x:
            share += x.astype(work.dtype)
            x[...] = share
    return dq


def delta_of(
    dout: Array, out: Array, lse: Array, low: Array | None, dlse: Array | None
) -> tuple[Array, Array]:
    """Return dout and delta = rowsum(dout * out) - dlse, computed once, where the queries are.

    Both have the factor exp(-low), and are 0 in rows that see nothing (lse = -inf), whatever comes
    from above, NaN too: no gradient goes through them.

    Parameters
    ----------
    dout, out : (B, H, s_q, D_V)
    lse : (B, H, s_q)
        Over all keys.
    low : (B, H, s_q), optional
        What lse has lost in rounding (`remainder_of`); 0 unless given.
    dlse : (B, H, s_q), optional

    Returns
    -------
    dout : (B, H, s_q, D_V)
    delta : (B, H, s_q), accumulator dtype
    """
    xp, zero = array_module(lse), dout.dtype.type(0)
    wide = np.dtype(accumulator(dtype_name(dout)))
    seen = lse != -xp.inf
    dout, dlse = xp.where(seen[..., None], dout, zero), xp.zeros_like(lse) if dlse is None else dlse
    if low is not None:
        factor = xp.exp(-low)
        # Rounded to its dtype before delta is taken from it: the two must fit each other.
        dout, dlse = (dout.astype(wide) * factor[..., None]).astype(dout.dtype), dlse * factor
    delta = (dout.astype(wide) * out).sum(axis=-1) - dlse
    return dout, xp.where(seen, delta, 0.0)


# Batch entry, key-value heads and query rows of one tile.
At = tuple[int, slice, slice]


class _Tiles:
    """How a block is cut, and the way from its arrays to a tile's and back.

    The query heads that share a key-value head are laid one under the other, so that a tile is one
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
        self.tile_keys = max(1, min(self.s_kv, max(1024, scores // lines)))
        self.scratch = self.xp.empty((2, lines * self.tile_keys), self.dtype)

    def row_tiles(self) -> Iterator[At]:
        """Yield every tile's batch entry, key-value heads and rows."""
        for b in range(self.B):
            for heads in tiles(self.H_KV, self.tile_heads):
                for rows in tiles(self.s_q, self.tile_rows):
                    yield b, heads, rows

    def key_tiles(self) -> Iterator[slice]:
        """Yield every tile's keys."""
        return tiles(self.s_kv, self.tile_keys)

    def new_rows(self, *width: int) -> Array:
        """Return an array (B, H, s_q, *width) in the accumulator dtype, to be stored into."""
        return self.xp.empty((self.B, self.H, self.s_q, *width), self.dtype)

    def load(self, x: Array, at: At) -> Array:
        """Return a tile (heads, G rows, ...) of x (B, H, s_q, ...), in the accumulator dtype."""
        b, heads, rows = at
        tile = x[b, self._query_heads(heads), rows].astype(self.dtype)
        return tile.reshape(heads.stop - heads.start, -1, *x.shape[3:])

    def store(self, x: Array, at: At, tile: Array) -> None:
        """Write a tile back to where `load` would read it."""
        b, heads, rows = at
        view = x[b, self._query_heads(heads), rows]
        view[...] = tile.reshape(view.shape)

    def load_keys(self, x: Array, at: At, keys: slice) -> Array:
        """Return a tile (heads, keys, ...) of keys or values; a copy only if the dtype differs."""
        return x[at[0], at[1], keys].astype(self.dtype, copy=False)

    def product(self, which: int, a: Array, b: Array) -> Array:
        """Return a b^T in scratch number `which`, which the next tile uses again."""
        shape = (*a.shape[:2], b.shape[1])
        out = self.scratch[which, : prod(shape)].reshape(shape)
        return self.xp.matmul(a, b.swapaxes(-1, -2), out=out)

    def over_rows(self, a: Array, b: Array) -> Array:
        """Return a^T b.  A single row is multiplied out: NumPy's matmul is four times as slow."""
        a = a.swapaxes(-1, -2)
        return a * b if b.shape[1] == 1 else a @ b

    def scores(self, q_tile: Array, k_tile: Array, at: At, keys: slice) -> Array:
        """Return masked scores (heads, G rows, keys), in scratch number 0."""
        b, heads, rows = at
        scores = self.product(0, q_tile, k_tile)
        tile = self.mask.tile(slice(b, b + 1), self._query_heads(heads), rows, keys, self.xp.arange)
        if tile is not None:
            by_head = scores.reshape(-1, rows.stop - rows.start, scores.shape[2])
            if tile.dtype == bool:
                self.xp.copyto(by_head, -self.xp.inf, where=~tile[0])
            else:
                with np.errstate(over="ignore"):  # what the accumulator cannot hold is -inf
                    by_head += tile[0].astype(self.dtype, copy=False)
        return scores

    def _query_heads(self, heads: slice) -> slice:
        return slice(heads.start * self.G, heads.stop * self.G)
