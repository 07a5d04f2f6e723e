r"""Reference implementation in NumPy, float64, of attention in one process: the ground truth.

    s   = scale q k^T + mask
    lse = log sum_j exp(s_j)
    out = sum_j exp(s_j - lse) v_j

and, with delta = rowsum(dout * out) - dlse,

    p  = exp(s) / sum_j exp(s_j)           dv = p^T dout
    ds = scale p (dout v^T - delta)        dq = ds k       dk = ds^T q

The softmax takes two passes, first the maximum of each row over all keys, then the sums.  So
nothing here depends on the merge, which the distributed implementations use and this file checks.
The backward computes the softmax again, as rounding may have cost lse the log of the number of keys
(see `merge`).  Queries and keys are tiled: beyond arguments and results, memory is a few tiles of
scores (16 MB each) and of rows of queries (B H 1,024 D numbers each).

Equations: arXiv:2307.08691, section 2.2; lse and delta are in its algorithms 1 and 2.
"""

from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.common.masks import MaskRule, MaskView, tiles
from lvxattn.common.rules import Rule
from lvxattn.common.validation import (
    check_attention,
    check_backward,
    check_mask_rows,
    check_numpy,
)

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

# Scores in one tile: 2**21 fp64 numbers are 16 MB, and a few such arrays exist at once.
TILE_SCORES = 2**21
TILE_ROWS = 1024


def full_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    *,
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
) -> tuple[Array, Array]:
    """Attend from all queries to all keys.  Not collective.

    Parameters
    ----------
    q : (B, H, S_Q, D)
    k : (B, H_KV, S_KV, D)
        H is a multiple of H_KV; head h reads group ``h // (H // H_KV)``.
    v : (B, H_KV, S_KV, D_V)
        All three of one floating dtype.
    scale : float, optional
        Default: ``1 / sqrt(D)``.
    mask : array or callable, optional
        bool (True = may attend) or additive float, broadcastable to (B, H, S_Q, S_KV) with its last
        axis S_KV; or ``mask(b, h, q_index, kv_index) -> bool`` on broadcastable index arrays.

    Returns
    -------
    out : (B, H, S_Q, D_V), float64
    lse : (B, H, S_Q), float64
        Natural log of the sum of exponentiated scores; -inf, with out = 0, where a query may attend
        to no key.

    Raises
    ------
    ValueError, TypeError
        The message names the argument, what was expected and what was given.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import full_attention
    >>> q, k = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 4, 2))  # all scores are 0
    >>> v = np.arange(4.0).reshape(1, 1, 4, 1)
    >>> out, lse = full_attention(q, k, v)
    >>> float(out[0, 0, 0, 0]), bool(lse[0, 0, 0] == np.log(4))
    (1.5, True)
    """
    check_numpy(q)
    check_attention(q, k, v, scale=scale, mask=mask)
    check_mask_rows(mask, q.shape[2])
    if isinstance(mask, Rule):
        mask.check(q.shape[2], k.shape[2])
    scale = 1 / sqrt(q.shape[3]) if scale is None else float(scale)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)
    for rows in _row_tiles(q):
        maximum = _maximum(q, k, rows, scale, mask)
        total = np.zeros_like(maximum)
        for keys in _key_tiles(q, k):
            p = np.exp(_scores(q, k, rows, keys, scale, mask) - maximum[..., None])
            total += p.sum(axis=-1)
            out[:, :, rows] += _ungroup(_group(p, k) @ _fp64(v, keys))
        seen = total != 0
        lse[:, :, rows] = np.where(seen, maximum + np.log(np.where(seen, total, 1.0)), -np.inf)
        out[:, :, rows] /= np.where(seen, total, 1.0)[..., None]
    return out, lse


def full_attention_backward(
    dout: AnyArray,
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    out: AnyArray,
    lse: AnyArray,
    *,
    scale: float | None = None,
    mask: AnyArray | MaskRule | None = None,
    dlse: AnyArray | None = None,
) -> tuple[Array, Array, Array]:
    """Differentiate `full_attention`.  Not collective.

    Parameters
    ----------
    dout : (B, H, S_Q, D_V)
        Gradient of the loss with respect to out.
    q, k, v, scale, mask
        As given to `full_attention`.
    out, lse
        As returned by it.
    dlse : (B, H, S_Q), optional
        Gradient of the loss with respect to lse; default: 0.

    Returns
    -------
    dq, dk, dv : float64, shaped as q, k, v

    Raises
    ------
    ValueError, TypeError
        As `full_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import full_attention, full_attention_backward
    >>> q, k = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 4, 2))
    >>> v = np.arange(4.0).reshape(1, 1, 4, 1)
    >>> out, lse = full_attention(q, k, v)
    >>> dq, dk, dv = full_attention_backward(np.ones_like(out), q, k, v, out, lse)
    >>> dv[0, 0, :, 0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    check_numpy(q)
    check_attention(q, k, v, scale=scale, mask=mask)
    check_mask_rows(mask, q.shape[2])
    if isinstance(mask, Rule):
        mask.check(q.shape[2], k.shape[2])
    check_backward(q, v, dout, out, lse, dlse)
    scale = 1 / sqrt(q.shape[3]) if scale is None else float(scale)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for rows in _row_tiles(q):
        dout_rows = dout[:, :, rows].astype(np.float64)
        maximum = _maximum(q, k, rows, scale, mask)
        total = np.zeros_like(maximum)
        for keys in _key_tiles(q, k):
            p = np.exp(_scores(q, k, rows, keys, scale, mask) - maximum[..., None])
            total += p.sum(axis=-1)
        dead = total == 0  # no gradient passes through these rows, even where dout is NaN
        total[dead], dout_rows[dead] = 1.0, 0.0
        delta = (dout_rows * out[:, :, rows].astype(np.float64)).sum(axis=-1)
        if dlse is not None:
            delta -= np.where(dead, 0.0, dlse[:, :, rows])
        for keys in _key_tiles(q, k):
            p = np.exp(_scores(q, k, rows, keys, scale, mask) - maximum[..., None])
            p /= total[..., None]
            # (B, H, rows, keys)
            dp = _ungroup(_group(dout_rows, k) @ _fp64(v, keys).swapaxes(-1, -2))
            ds = scale * p * (dp - delta[..., None])
            q_rows = q[:, :, rows].astype(np.float64)
            dv[:, :, keys] += _over_rows(p, dout_rows, k)
            dk[:, :, keys] += _over_rows(ds, q_rows, k)
            dq[:, :, rows] += _ungroup(_group(ds, k) @ _fp64(k, keys))
    return dq, dk, dv


def _maximum(
    q: AnyArray, k: AnyArray, rows: slice, scale: float, mask: AnyArray | MaskRule | None
) -> Array:
    """Return the largest score of each row; 0 in a row that sees no key, where exp gives 0."""
    maximum = np.full((*q.shape[:2], rows.stop - rows.start), -np.inf)
    for keys in _key_tiles(q, k):
        maximum = np.maximum(maximum, _scores(q, k, rows, keys, scale, mask).max(axis=-1))
    return np.where(maximum == -np.inf, 0.0, maximum)


def _scores(
    q: AnyArray,
    k: AnyArray,
    rows: slice,
    keys: slice,
    scale: float,
    mask: AnyArray | MaskRule | None,
) -> Array:
    q_rows = q[:, :, rows].astype(np.float64)
    # (B, H, rows, keys)
    scores = scale * _ungroup(_group(q_rows, k) @ _fp64(k, keys).swapaxes(-1, -2))
    everything = slice(0, q.shape[0]), slice(0, q.shape[1])
    # A callable mask is called on global indices, which np.arange makes.
    mask_tile = MaskView.of(mask).tile(*everything, rows, keys, np.arange)
    if mask_tile is None:
        return scores
    return np.where(mask_tile, scores, -np.inf) if mask_tile.dtype == bool else scores + mask_tile


def _over_rows(a: Array, b: Array, k: AnyArray) -> Array:
    """Return a^T b, summed over the query heads of a group."""
    products = _group(a, k).swapaxes(-1, -2) @ _group(b, k)  # (B, H_KV, H / H_KV, keys, ...)
    total: Array = products.sum(axis=2)  # (B, H_KV, keys, ...)
    return total


def _group(x: Array, k: AnyArray) -> Array:
    """Split the query heads (B, H, s, ...) by the key-value head that they read."""
    B, H, *rest = x.shape
    return x.reshape(B, k.shape[1], H // k.shape[1], *rest)  # (B, H_KV, H / H_KV, s, ...)


def _ungroup(x: Array) -> Array:
    """Undo `_group`."""
    B, H_KV, G, *rest = x.shape
    return x.reshape(B, H_KV * G, *rest)  # (B, H, s, ...)


def _fp64(x: AnyArray, keys: slice) -> Array:
    """Return one tile of keys or values, with an axis for the query heads of a group."""
    return x[:, :, None, keys].astype(np.float64)  # (B, H_KV, 1, keys, ...)


def _row_tiles(q: AnyArray) -> Iterator[slice]:
    return tiles(q.shape[2], TILE_ROWS)


def _key_tiles(q: AnyArray, k: AnyArray) -> Iterator[slice]:
    heads_and_rows = q.shape[0] * q.shape[1] * min(q.shape[2], TILE_ROWS)
    return tiles(k.shape[2], max(1, TILE_SCORES // max(1, heads_and_rows)))
