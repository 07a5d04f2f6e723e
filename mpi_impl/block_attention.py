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

The elementwise steps between two matrix products work in place on a tile that stays in a core's
cache (NumPy) or fills the device (CuPy).  Between tiles `progress` is called, for MPI to continue
its transfers.  For CuPy arrays `kernels/` does the same in one kernel on tensor cores, where it
can.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lvxattn.common.masks import MaskRule, MaskView
from lvxattn.common.rules import Rule
from lvxattn.common.validation import accumulator, dtype_name

from . import kernels
from .merge import lse_of, merge_partials
from .tiles import Tiles
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
        A mask of this block, or the view of a rank's mask that `Layout.view` returns.
    progress : callable
        Called between tiles.
    kernel : str
        ``"tiles"``: these steps, for any block; ``"cuda"``: those of `kernels`; ``"auto"``: the
        value of ``LVXATTN_KERNEL`` or, where that is not set, ``"cuda"`` where it is supported.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    lse : (B, H, s_q), accumulator dtype
        Natural log; (0, -inf) where a query may attend to no key.

    Raises
    ------
    ValueError
        `kernel`, or the variable, is none of these, or does not support this block.
    RuntimeError
        ``"cuda"`` is requested, and cannot be compiled.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.mpi_impl import block_attention
    >>> q, k, v = (np.ones((1, 2, s, 8), np.float16) for s in (6, 50, 50))
    >>> out, lse = block_attention(q, k, v, scale=1.0)
    >>> out.shape, out.dtype, lse.shape
    ((1, 2, 6, 8), dtype('float32'), (1, 2, 6))
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
    """Compute `block_attention` as a partial result, the form that `merge_partials` joins.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    top, total : (B, H, s_q), accumulator dtype
        The largest score, and the sum of exponentiated scores divided by exp(top); (0, -inf, 0)
        where a query may attend to no key.  Of `kernels`: lse and 1.
    """
    view, xp = MaskView.of(mask), array_module(q)
    if isinstance(view.mask, Rule):
        out = xp.zeros((*q.shape[:3], v.shape[3]), accumulator(dtype_name(q)))
        top, total = xp.full(q.shape[:3], -xp.inf, out.dtype), xp.zeros(q.shape[:3], out.dtype)
        for rows, keys, part in view.parts(q, k):
            found = partial_attention(
                q[:, :, rows], k[:, :, keys], v[:, :, keys],
                scale=scale, mask=part, progress=progress, kernel=kernel,
            )  # fmt: skip
            out[:, :, rows], top[:, :, rows], total[:, :, rows] = merge_partials(
                out[:, :, rows], top[:, :, rows], total[:, :, rows], *found
            )
        return out, top, total
    if kernels.choose(q, k, v, view.mask, kernel).kernel == "cuda":
        out, lse = kernels.forward(xp, q, k, v, scale=float(scale))
        progress()
        return out, lse, xp.ones_like(lse)
    work = Tiles(q, k, view)
    out, top, total = work.new_rows(v.shape[3]), work.new_rows(), work.new_rows()
    for at in work.row_tiles():
        q_tile = work.load(q, at) * float(scale)
        out_tile = xp.zeros((*q_tile.shape[:2], v.shape[3]), work.dtype)
        top_tile = xp.full(q_tile.shape[:2], -xp.inf, work.dtype)
        total_tile = xp.zeros(q_tile.shape[:2], work.dtype)
        for keys in work.key_tiles():
            # 1. Compute scores, with -inf where a query may not attend.
            p = work.scores(q_tile, work.load_keys(k, at, keys), at, keys)
            # 2. Softmax over this tile alone.  Where a row sees no key, 0 avoids -inf - -inf.
            row_max = p.max(axis=-1)
            base = xp.where(row_max == -xp.inf, 0.0, row_max)
            p -= base[..., None]
            xp.exp(p, out=p)
            row_sum = p.sum(axis=-1)
            row_out = p @ work.load_keys(v, at, keys)
            row_out /= xp.where(row_sum == 0, 1.0, row_sum)[..., None]
            # 3. Join it with the tiles before.
            out_tile, top_tile, total_tile = merge_partials(
                out_tile, top_tile, total_tile, row_out, row_max, row_sum
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
    wanted: str = "qkv",
    progress: Callable[[], None] = lambda: None,
    kernel: str = "auto",
) -> Array:
    """Differentiate `block_attention`, given lse and delta over all keys of all ranks.

    Not collective.  Adds the share of this block to dk and dv in place.

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
        Added to in place if wanted.  In the accumulator dtype, or in k's where nothing else is
        added to them: the sums of this block are taken in the former, and then rounded once.
    wanted : str
        The arguments whose gradients are computed: ``"qkv"``, ``"q"``, ``"kv"`` or ``""``.

    Returns
    -------
    dq : (B, H, s_q, D), accumulator dtype
        The share of these keys; 0 if not wanted.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.mpi_impl import block_attention, block_attention_backward
    >>> q, k, v = (np.ones((1, 2, s, 8)) for s in (6, 50, 50))
    >>> out, lse = block_attention(q, k, v, scale=1.0)
    >>> dout, dk, dv = np.ones_like(out), np.zeros_like(k), np.zeros_like(v)
    >>> delta = (dout * out).sum(axis=-1)
    >>> dq = block_attention_backward(dout, q, k, v, lse, delta, dk, dv, scale=1.0)
    >>> np.allclose(dv, 6 / 50)  # each of 6 queries gives each of 50 keys an equal weight
    True
    """
    view, xp = MaskView.of(mask), array_module(q)
    if not wanted:
        return xp.zeros(q.shape, accumulator(dtype_name(q)))
    if isinstance(view.mask, Rule):
        dq = xp.zeros(q.shape, accumulator(dtype_name(q)))
        for rows, keys, part in view.parts(q, k):
            dq[:, :, rows] += block_attention_backward(
                dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys],
                lse[:, :, rows], delta[:, :, rows], dk[:, :, keys], dv[:, :, keys],
                scale=scale, mask=part, wanted=wanted, progress=progress, kernel=kernel,
            )  # fmt: skip
        return dq
    if kernels.choose(q, k, v, view.mask, kernel).kernel == "cuda":
        dq = kernels.backward(
            xp, dout, q, k, v, lse, delta, dk, dv, scale=float(scale), wanted=wanted
        )
        progress()
        return dq
    work = Tiles(q, k, view)
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
            # 1. Compute the probabilities of these keys among all keys.
            p = work.scores(q_tile, k_tile, at, keys)
            p -= base[..., None]
            xp.exp(p, out=p)
            # 2. Compute their gradients, and those of the scores.
            ds = work.product(1, dout_tile, v_tile)  # without scale, which q_tile has, and dq gets
            ds -= delta_tile[..., None]
            ds *= p
            # 3. Add to plain sums; the heads of a group share their key-value head.
            if "k" in wanted:
                dv_sum[at[0], at[1], keys] += work.over_rows(p, dout_tile)
                dk_sum[at[0], at[1], keys] += work.over_rows(ds, q_tile)
            if "q" in wanted:
                dq_tile += ds @ k_tile
            progress()
        work.store(dq, at, dq_tile * float(scale))
    for x, share in zip((dk, dv), sums, strict=True):
        if share is not x:
            share += x.astype(work.dtype)
            x[...] = share
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
    delta : (B, H, s_q), accumulator dtype
    """
    xp, zero = array_module(lse), dout.dtype.type(0)
    wide = np.dtype(accumulator(dtype_name(dout)))
    seen = lse != -xp.inf
    dout, dlse = xp.where(seen[..., None], dout, zero), xp.zeros_like(lse) if dlse is None else dlse
    if lse_remainder is not None:
        factor = xp.exp(-lse_remainder)
        # Rounded before delta is computed from it: the two must be consistent.
        dout, dlse = (dout.astype(wide) * factor[..., None]).astype(dout.dtype), dlse * factor
    delta = (dout.astype(wide) * out).sum(axis=-1) - dlse
    return dout, xp.where(seen, delta, 0.0)
