"""Attention as plain as can be, in fp64: nothing tiled, nothing merged, heads repeated.

Beside each result stands its size: what the result would be if nothing in its sums cancelled.  The
rounding error of a sum is proportional to that, so tolerances are multiples of it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Truth:
    """Results of the whole problem and their sizes, by name: out, lse, dq, dk, dv."""

    results: dict[str, Array]
    sizes: dict[str, Array]
    largest_score: float
    largest_factor: float  # no factor of a probability in any sum is larger


def naive_attention(
    q: Array, k: Array, v: Array, scale: float, mask: Any, dout: Array, dlse: Array
) -> Truth:
    """Return out, lse, dq, dk and dv for the loss sum(dout out) + sum(dlse lse)."""
    B, H, S_Q, _ = q.shape
    H_KV, S_KV = k.shape[1:3]
    q, k, v, dout, dlse = (x.astype(np.float64) for x in (q, k, v, dout, dlse))
    k_all, v_all = (np.repeat(x, H // H_KV, axis=1) for x in (k, v))
    s = scale * (q @ _t(k_all))
    largest = scale * (abs(q) @ _t(abs(k_all))).max(initial=0.0)
    if callable(mask):
        index = np.ix_(*(np.arange(n) for n in (B, H, S_Q, S_KV)))
        mask = np.broadcast_to(mask(*index), s.shape)
    if mask is not None:
        s = np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask.astype(np.float64)
        if mask.dtype != bool:
            largest += abs(mask[np.isfinite(mask)].astype(np.float64)).max(initial=0.0)
    top = s.max(axis=-1, initial=-np.inf)
    top = np.where(top == -np.inf, 0.0, top)
    e = np.exp(s - top[..., None])
    total = e.sum(axis=-1)
    alive = total > 0
    safe = np.where(alive, total, 1.0)
    p = e / safe[..., None]
    lse = np.where(alive, top + np.log(safe), -np.inf)
    out = p @ v_all
    dp = dout @ _t(v_all)
    delta = (dout * out).sum(axis=-1) - dlse
    ds = p * (dp - delta[..., None])

    def ungroup(x: Array) -> Array:
        return x.reshape(B, H_KV, H // H_KV, S_KV, x.shape[-1]).sum(axis=2)

    results = {
        "out": out,
        "lse": lse,
        "dq": scale * (ds @ k_all),
        "dk": scale * ungroup(_t(ds) @ q),
        "dv": ungroup(_t(p) @ dout),
    }
    out_size = p @ abs(v_all)
    delta_size = (abs(dout) * out_size).sum(axis=-1) + abs(dlse)
    ds_size = p * (abs(dout) @ _t(abs(v_all)) + delta_size[..., None])
    sizes = {
        "out": out_size,
        "lse": np.where(alive, 1.0, 0.0),
        "dq": scale * (ds_size @ abs(k_all)),
        "dk": scale * ungroup(_t(ds_size) @ abs(q)),
        "dv": ungroup(_t(p) @ abs(dout)),
    }
    magnitudes = [1 + abs(x).max(initial=0.0) for x in (q, k, v, dout, dlse)]
    return Truth(results, sizes, float(largest), float(np.prod(magnitudes)) * q.shape[3])


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)
