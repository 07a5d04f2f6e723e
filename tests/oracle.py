"""Functions that fulfil the oracle's contract, in every library, as a basis for its tests."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lvxattn.check import Case, Report, case_of, check
from lvxattn.reference import full_attention, full_attention_backward

Array = np.ndarray[Any, np.dtype[Any]]

GAUSSIAN = case_of("gaussian")
TWO = (case_of("one-key"), GAUSSIAN)


def right(q: Array, k: Array, v: Array, *, scale: float, mask: Any) -> tuple[Array, Array]:
    """Attend in fp64; round once."""
    out, lse = full_attention(q, k, v, scale=scale, mask=mask)
    return out.astype(q.dtype), lse


def right_backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, *, scale: float, mask: Any
) -> tuple[Array, ...]:
    """Differentiate in fp64; round once."""
    found = full_attention_backward(dout, q, k, v, out, lse, scale=scale, mask=mask)
    return tuple(x.astype(q.dtype) for x in found)


def plain(xp: Any, q: Any, k: Any, v: Any, scale: float, mask: Any, double: Any) -> tuple[Any, Any]:
    """Attend in fp64 with the operations that PyTorch and JAX share; round once.

    Parameters
    ----------
    xp : module
        torch or jax.numpy.
    q, k, v, scale, mask
        As the oracle gives them.
    double : dtype
        The accumulator's.
    """
    B, H, S_Q, _ = q.shape
    H_KV, S_KV, D_V = v.shape[1:]
    wide = q.astype(double) if hasattr(q, "astype") else q.to(double)
    k, v = (x.astype(double) if hasattr(x, "astype") else x.to(double) for x in (k, v))
    grouped = wide.reshape(B, H_KV, -1, q.shape[3])
    s = scale * (grouped @ k.swapaxes(-1, -2)).reshape(B, H, S_Q, S_KV)
    if callable(mask):
        b, h, i, j = (xp.arange(n) for n in s.shape)
        mask = mask(b[:, None, None, None], h[:, None, None], i[:, None], j)
    if mask is not None:
        is_bool = str(mask.dtype).removeprefix("torch.") == "bool"
        s = xp.where(mask, s, -xp.inf) if is_bool else s + mask
    top = xp.amax(s, -1) if xp.__name__ == "torch" else s.max(-1)
    top = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    p = xp.exp(s - top[..., None])
    total = p.sum(-1)
    safe = xp.where(total > 0, total, xp.ones_like(total))
    out = (p.reshape(B, H_KV, -1, S_KV) @ v).reshape(B, H, S_Q, D_V) / safe[..., None]
    lse = xp.where(total > 0, top + xp.log(safe), -xp.inf)
    return (out.astype(q.dtype) if hasattr(out, "astype") else out.to(q.dtype)), lse


def checked(
    fn: Callable[..., Any], cases: Sequence[Case] = TWO, dtypes: Any = ("float64",), **options: Any
) -> Report:
    """Check a function on a few cases."""
    return check(fn, cases=cases, dtypes=dtypes, **options)


def message(fn: Callable[..., Any], case: Case = GAUSSIAN, **options: Any) -> str:
    """Return the error message of the only case."""
    (row,) = checked(fn, [case], **options).rows
    assert row.status == "error", row
    return row.message
