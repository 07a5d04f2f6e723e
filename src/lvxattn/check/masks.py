"""The masks of the cases."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.cases import Case
from lvxattn.common.masks import MaskRule

Array = npt.NDArray[Any]
Mask = Array | MaskRule | None


def _random(case: Case, rng: np.random.Generator, *broadcast: int) -> Array:
    shape = [case.B, case.H, case.S_Q, case.S_KV]
    for axis in broadcast:
        shape[axis] = 1
    visible = rng.random(shape) < 0.6
    visible[..., 0] = True  # every row sees something
    return visible


def _padding(case: Case, rng: np.random.Generator) -> Array:
    lengths = rng.permutation(np.linspace(case.S_KV // 3, case.S_KV - 1, case.B).astype(int))
    return (np.arange(case.S_KV) < lengths[:, None])[:, None, None]


# What people hide whole rows with, from the last row but one upwards; -inf is the dtype's minimum.
LOWS = (-1e4, -2e5, -1e9, -1e15, -np.inf)


def _finite_minimum(case: Case, rng: np.random.Generator) -> Array:
    """Return a bias whose hidden entries are -inf: `problem.draw` puts the dtype's minimum there.

    The last row is hidden as a whole, by a number that lse can hold beside the scores; those before
    it by `LOWS`.
    """
    bias = rng.standard_normal((1, 1, case.S_Q, case.S_KV))
    bias[~_random(case, rng)[:1, :1]] = -np.inf
    bias[:, :, -1] = -10000
    bias[:, :, -1 - len(LOWS) : -1] = np.array(LOWS)[:, None]
    return bias


def _minus_infinity(case: Case, rng: np.random.Generator) -> Array:
    hidden = np.where(_random(case, rng, 1), 0.0, -np.inf)
    hidden[:, :, 1::4] = -np.inf
    return hidden


def _callable(case: Case, rng: np.random.Generator) -> MaskRule:
    """Return a frame-by-frame rule: a query sees the frames up to its own, every other head."""
    frame, shift = max(2, case.S_KV // 8), int(rng.integers(1, 4))

    def rule(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        early = kv_index * case.S_Q <= (q_index + 1) * case.S_KV - shift * b
        return early & ((h % 2 == 0) | (kv_index // frame % 2 == 0))

    return rule


def _dead_rows(case: Case, rng: np.random.Generator) -> Array:
    mask = _random(case, rng)
    mask[:, :, 1::4] = False
    return mask


def _dead_shard(case: Case, rng: np.random.Generator) -> Array:
    mask = _random(case, rng)
    mask[..., : case.S_KV // 2] = False
    mask[..., case.S_KV // 2] = True
    return mask


def _all_dead(case: Case, _rng: np.random.Generator) -> Array:
    return np.zeros((case.B, 1, case.S_Q, case.S_KV), bool)


MASKS: dict[str, Callable[[Case, np.random.Generator], Mask]] = {
    "none": lambda _case, _rng: None,
    "random": _random,
    "over heads": lambda case, rng: _random(case, rng, 1),
    "over batches": lambda case, rng: _random(case, rng, 0),
    "padding": _padding,
    "finite minimum": _finite_minimum,
    "minus infinity": _minus_infinity,
    "callable": _callable,
    "dead rows": _dead_rows,
    "dead shard": _dead_shard,
    "all dead": _all_dead,
}


def seeing(mask: Mask, case: Case) -> Array:
    """Return which queries see a key in any batch entry and head: (S_Q,), bool.

    Parameters
    ----------
    mask : Mask
    case : Case
    """
    if mask is None:
        return np.ones(case.S_Q, bool)
    if callable(mask):
        mask = np.asarray(mask(*np.ix_(*map(np.arange, (case.B, case.H, case.S_Q, case.S_KV)))))
    visible = mask if mask.dtype == bool else mask > -np.inf
    return np.broadcast_to(visible.any(axis=(0, 1, 3)), case.S_Q)
