r"""Attention of one block of queries to one rank's keys.

Keys are processed tile by tile.  Each tile gives attention over its keys alone, and
`merge_partials` joins it with the tiles before; scores are kept for one tile only.

    s = scale q k^T + mask       p = exp(s - top)      top = rowmax s
    out = p v / total            total = rowsum p      lse = top + log total

The backward needs no running maximum.  lse over all keys of all ranks is known, so that a tile's
probabilities are final,

    p  = exp(s - lse)                   dv = p^T dout
    ds = scale p (dout v^T - delta)     dq = ds k       dk = ds^T q

and the sums over tiles, blocks and ranks are plain sums.

In float32, an lse of 1e9 has lost the log of the number of keys.  With `lse_remainder`, the exact
lse less the rounded one, the true p is exp(-lse_remainder) exp(s - lse).  Gradients are linear in
dout and delta, so that `delta_of` applies the factor to those, and nothing more has to travel.

Equations: arXiv:2307.08691, algorithms 1 and 2.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.common.masks import MaskRule, MaskView, tiles

from .merge import lse_of, merge_partials

Array = npt.NDArray[np.float64]

# Scores in one tile.
TILE_SCORES = 2**20


def block_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    mask: MaskView | npt.NDArray[Any] | MaskRule | None = None,
) -> tuple[Array, Array]:
    """Attend from a block of queries to one rank's keys.  Not collective.

    Parameters
    ----------
    q : (B, H, s_q, D)
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
    scale : float
    mask : optional
        A mask of this block, or the view of a rank's mask that `Layout.view` returns.

    Returns
    -------
    out : (B, H, s_q, D_V)
    lse : (B, H, s_q)
        Natural log; (0, -inf) where a query may attend to no key.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import block_attention
    >>> q, k, v = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 4, 2)), np.ones((1, 1, 4, 3))
    >>> out, lse = block_attention(q, k, v, scale=1.0)
    >>> out.shape, bool(lse[0, 0, 0] == np.log(4))
    ((1, 1, 1, 3), True)
    """
    out, top, total = partial_attention(q, k, v, scale=scale, mask=mask)
    return out, lse_of(top, total)


def partial_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    mask: MaskView | npt.NDArray[Any] | MaskRule | None = None,
) -> tuple[Array, Array, Array]:
    """Compute `block_attention` as a partial result, the form that `merge_partials` joins.

    Returns
    -------
    out : (B, H, s_q, D_V)
    top, total : (B, H, s_q)
        The largest score, and the sum of exponentiated scores divided by exp(top); (0, -inf, 0)
        where a query may attend to no key.
    """
    out = np.zeros((*q.shape[:3], v.shape[3]))
    top, total = np.full(q.shape[:3], -np.inf), np.zeros(q.shape[:3])
    for rows, keys, mask_view in _tiles(q, k, mask):
        # 1. Compute scores, with -inf where a query may not attend.
        scores = _scores(q[:, :, rows], k[:, :, keys], scale, mask_view)  # (B, H, rows, keys)
        # 2. Softmax over this tile alone.  Where a row sees no key, 0 avoids -inf - -inf.
        row_max = scores.max(axis=-1)
        base = np.where(row_max == -np.inf, 0.0, row_max)
        p = np.exp(scores - base[..., None])
        row_sum = p.sum(axis=-1)
        row_out = _ungroup(_group(p, k) @ v[:, :, None, keys])  # (B, H, rows, D_V)
        row_out /= np.where(row_sum == 0, 1.0, row_sum)[..., None]
        # 3. Join it with the tiles before.
        out[:, :, rows], top[:, :, rows], total[:, :, rows] = merge_partials(
            out[:, :, rows], top[:, :, rows], total[:, :, rows], row_out, row_max, row_sum
        )
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
    mask: MaskView | npt.NDArray[Any] | MaskRule | None = None,
    wanted: str = "qkv",
) -> Array:
    """Differentiate `block_attention`, given lse and delta over all keys of all ranks.

    Not collective.  Adds the share of this block to dk and dv in place.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
    q, k, v, scale, mask
        As given to `block_attention`.
    lse : (B, H, s_q)
        Over all keys.
    delta : (B, H, s_q)
        ``rowsum(dout * out) - dlse``, out over all keys.
    dk, dv : shaped as k, v
        Added to in place if wanted.
    wanted : str
        The arguments whose gradients are computed: ``"qkv"``, ``"q"``, ``"kv"`` or ``""``.

    Returns
    -------
    dq : (B, H, s_q, D)
        The share of these keys; 0 if not wanted.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import block_attention, block_attention_backward
    >>> q, k, v = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 4, 2)), np.ones((1, 1, 4, 3))
    >>> out, lse = block_attention(q, k, v, scale=1.0)
    >>> dout, dk, dv = np.ones_like(out), np.zeros_like(k), np.zeros_like(v)
    >>> delta = (dout * out).sum(axis=-1)
    >>> dq = block_attention_backward(dout, q, k, v, lse, delta, dk, dv, scale=1.0)
    >>> dv[0, 0, :, 0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    dq = np.zeros(q.shape)
    if not wanted:
        return dq
    base = np.where(lse == -np.inf, 0.0, lse)
    for rows, keys, mask_view in _tiles(q, k, mask):
        q_tile, dout_tile = q[:, :, rows], dout[:, :, rows]
        # 1. Compute the probabilities of these keys among all keys.
        scores = _scores(q_tile, k[:, :, keys], scale, mask_view)  # (B, H, rows, keys)
        p = np.exp(scores - base[:, :, rows, None])
        # 2. Compute their gradients, and those of the scores.
        dp = _ungroup(_group(dout_tile, k) @ v[:, :, None, keys].swapaxes(-1, -2))
        ds = scale * p * (dp - delta[:, :, rows, None])  # (B, H, rows, keys)
        # 3. Add to plain sums; the heads of a group share their key-value head.
        if "k" in wanted:
            dv[:, :, keys] += _over_rows(p, dout_tile, k)
            dk[:, :, keys] += _over_rows(ds, q_tile, k)
        if "q" in wanted:
            dq[:, :, rows] += _ungroup(_group(ds, k) @ k[:, :, None, keys])  # (B, H, rows, D)
    return dq


def delta_of(
    dout: Array, out: Array, lse: Array, lse_remainder: Array | None, dlse: Array | None
) -> tuple[Array, Array]:
    """Return dout and delta = rowsum(dout * out) - dlse, both times exp(-lse_remainder).

    Computed once, on the queries' rank.  Both are 0 in rows that see no key (lse = -inf), even
    where dout or dlse is NaN: no gradient passes through such rows.

    Parameters
    ----------
    dout, out : (B, H, s_q, D_V)
    lse : (B, H, s_q)
        Over all keys.
    lse_remainder : (B, H, s_q), optional
        Rounding error of lse, from `lse_remainder_of`; default: 0.
    dlse : (B, H, s_q), optional

    Returns
    -------
    dout : (B, H, s_q, D_V)
    delta : (B, H, s_q)
    """
    seen = lse != -np.inf
    dout, dlse = np.where(seen[..., None], dout, 0.0), np.zeros_like(lse) if dlse is None else dlse
    if lse_remainder is not None:
        factor = np.exp(-lse_remainder)
        dout, dlse = dout * factor[..., None], dlse * factor
    delta = (dout * out).sum(axis=-1) - dlse
    return dout, np.where(seen, delta, 0.0)


def _tiles(
    q: Array, k: Array, mask: MaskView | npt.NDArray[Any] | MaskRule | None
) -> Iterator[tuple[slice, slice, MaskView]]:
    """Yield the rows and keys of every tile, and its mask; nothing of what a `Rule` hides."""
    B, H = q.shape[:2]
    for rows, keys, view in MaskView.of(mask).parts(q, k):
        size = _tile_keys(B * H * (rows.stop - rows.start))
        for tile in tiles(keys.stop - keys.start, size):
            start, stop = keys.start + tile.start, keys.start + tile.stop
            yield rows, slice(start, stop), view.from_key(tile.start)


def _tile_keys(lines: int) -> int:
    return max(1, TILE_SCORES // max(1, lines))


def _scores(q: Array, k: Array, scale: float, mask: MaskView) -> Array:
    B, H, s_q, _ = q.shape
    scores = scale * _ungroup(_group(q, k) @ k[:, :, None].swapaxes(-1, -2))  # (B, H, s_q, s_kv)
    # The view calls a callable mask on global indices, and makes them with np.arange.
    mask_tile = mask.tile(slice(0, B), slice(0, H), slice(0, s_q), slice(0, k.shape[2]), np.arange)
    if mask_tile is None:
        return scores
    return np.where(mask_tile, scores, -np.inf) if mask_tile.dtype == bool else scores + mask_tile


def _over_rows(a: Array, b: Array, k: Array) -> Array:
    """Return a^T b, summed over the query heads of a group."""
    products = _group(a, k).swapaxes(-1, -2) @ _group(b, k)  # (B, H_KV, H / H_KV, keys, ...)
    total: Array = products.sum(axis=2)  # (B, H_KV, keys, ...)
    return total


def _group(x: Array, k: Array) -> Array:
    """Split the query heads (B, H, s, ...) by the key-value head that they read."""
    B, H, *rest = x.shape
    return x.reshape(B, k.shape[1], H // k.shape[1], *rest)  # (B, H_KV, H / H_KV, s, ...)


def _ungroup(x: Array) -> Array:
    """Undo `_group`."""
    B, H_KV, G, *rest = x.shape
    return x.reshape(B, H_KV * G, *rest)  # (B, H, s, ...)
