"""Attention functions in NumPy, in the place of a published package."""

import numpy as np


def attention(q, k, v, *, scale, mask):
    """Attend; NaN in rows that see nothing."""
    if callable(mask):
        raise NotImplementedError("no masks that are functions")
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = scale * q @ k.swapaxes(-1, -2)
    if mask is not None:
        s = np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask
    with np.errstate(invalid="ignore"):
        p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p @ v / p.sum(axis=-1, keepdims=True)
