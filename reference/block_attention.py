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
"""

from math import prod
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
        A mask over this block, or the view that `Layout.view` gives of a rank's mask.

    Returns
    -------
    out : (B, H, s_q, D_V)
    lse : (B, H, s_q)
        Natural log; (0, -inf) where a query may attend to none of the keys.
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
    """Do what `block_attention` does, with lse as the pair that `merge_partials` joins.

    Returns
    -------
    out : (B, H, s_q, D_V)
    top, total : (B, H, s_q)
        The largest score, and the sum of exponentiated scores divided by exp(top); (0, -inf, 0)
        where a query may attend to none of the keys.
    """
    out = np.zeros((*q.shape[:3], v.shape[3]))
    top, total = np.full(q.shape[:3], -np.inf), np.zeros(q.shape[:3])
    for keys in tiles(k.shape[2], _tile_keys(q)):
        # 1. Scores, with -inf where a query may not look.
        scores = _scores(q, k, keys, scale, MaskView.of(mask))
        # 2. Softmax over this tile alone.  Where a row sees nothing: 0 instead of -inf - -inf.
        row_max = scores.max(axis=-1)
        base = np.where(row_max == -np.inf, 0.0, row_max)
        p = np.exp(scores - base[..., None])
        row_sum = p.sum(axis=-1)
        part = _ungroup(_group(p, k) @ v[:, :, None, keys])
        part /= np.where(row_sum == 0, 1.0, row_sum)[..., None]
        # 3. Join it with the tiles before.
        out, top, total = merge_partials(out, top, total, part, row_max, row_sum)
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
) -> Array:
    """Differentiate `block_attention` given lse and delta over all keys of all ranks.

    Not collective.  Adds this block's share to dk and dv in place.

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
        Added to in place.

    Returns
    -------
    dq : (B, H, s_q, D)
        The share of these keys.
    """
    dq = np.zeros(q.shape)
    base = np.where(lse == -np.inf, 0.0, lse)
    for keys in tiles(k.shape[2], _tile_keys(q)):
        # 1. The probabilities that these keys have among all keys.
        p = np.exp(_scores(q, k, keys, scale, MaskView.of(mask)) - base[..., None])
        # 2. Their gradients, and those of the scores.
        dp = _ungroup(_group(dout, k) @ v[:, :, None, keys].swapaxes(-1, -2))
        ds = scale * p * (dp - delta[..., None])
        # 3. Plain sums; the heads of a group share their key-value head.
        dv[:, :, keys] += (_group(p, k).swapaxes(-1, -2) @ _group(dout, k)).sum(axis=2)
        dk[:, :, keys] += (_group(ds, k).swapaxes(-1, -2) @ _group(q, k)).sum(axis=2)
        dq += _ungroup(_group(ds, k) @ k[:, :, None, keys])
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
    delta : (B, H, s_q)
    """
    seen = lse != -np.inf
    dout, dlse = np.where(seen[..., None], dout, 0.0), np.zeros_like(lse) if dlse is None else dlse
    if low is not None:
        factor = np.exp(-low)
        dout, dlse = dout * factor[..., None], dlse * factor
    delta = (dout * out).sum(axis=-1) - dlse
    return dout, np.where(seen, delta, 0.0)


def _tile_keys(q: Array) -> int:
    return max(1, TILE_SCORES // max(1, prod(q.shape[:3])))


def _scores(q: Array, k: Array, keys: slice, scale: float, mask: MaskView) -> Array:
    B, H, s_q, _ = q.shape
    scores = scale * _ungroup(_group(q, k) @ k[:, :, None, keys].swapaxes(-1, -2))
    tile = mask.tile(slice(0, B), slice(0, H), slice(0, s_q), keys, np.arange)
    if tile is None:
        return scores
    return np.where(tile, scores, -np.inf) if tile.dtype == bool else scores + tile


def _group(x: Array, k: Array) -> Array:
    """Split the query heads by the key-value head that they read: (B, H_KV, H / H_KV, s, ...)."""
    return x.reshape(x.shape[0], k.shape[1], x.shape[1] // k.shape[1], *x.shape[2:])


def _ungroup(x: Array) -> Array:
    """Undo `_group`: (B, H, s, ...)."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
