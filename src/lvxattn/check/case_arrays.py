"""The arrays of a case: drawn in fp64, rounded to a dtype.

Every result is judged against the truth of the rounded arrays: input rounding is not counted as
error.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.cases import DTYPES, Case
from lvxattn.cli.tensors import dtype_of
from lvxattn.common.masks import MaskRule

Array = npt.NDArray[Any]
Mask = Array | MaskRule | None

MEMORY = (
    *("contiguous", "transposed", "sequence-major", "broadcast", "read-only", "cache", "mixed"),
)
CALLS = ("", "other dtype", "other data", "in between", "repeated")


@dataclass(frozen=True)
class Problem:
    """One case in one dtype.

    Attributes
    ----------
    case : Case
    seed : int
    dtype : str
        ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    q : (B, H, S_Q, D)
    k : (B, H_KV, S_KV, D)
    v : (B, H_KV, S_KV, D_V)
    dout : (B, H, S_Q, D_V)
        In dtype; bfloat16 is ml_dtypes'.
    scale : float
    mask : None, bool or additive array in dtype, or callable
    q_kinds : (S_Q,)
    kv_kinds : (S_KV,)
        Rows with the same number are judged together.
    known : dict
        Exact results, by name, that need no computing.
    """

    case: Case
    seed: int
    dtype: str
    q: Array
    k: Array
    v: Array
    dout: Array
    scale: float
    mask: Mask
    q_kinds: Array
    kv_kinds: Array
    known: dict[str, Array] = field(default_factory=dict)

    def astype(self, dtype: Any) -> "Problem":
        """Return the same numbers in a NumPy dtype; an additive mask too."""
        mask = self.mask
        if isinstance(mask, np.ndarray) and mask.dtype != bool:
            mask = mask.astype(dtype)
        arrays = {name: getattr(self, name).astype(dtype) for name in ("q", "k", "v", "dout")}
        return replace(self, mask=mask, **arrays)

    def dense_mask(self) -> Array | None:
        """Return the mask as an array that broadcasts to (B, H, S_Q, S_KV), or None."""
        return mask_array(self.mask, (*self.q.shape[:3], self.k.shape[2]))


def mask_array(mask: Mask, shape: tuple[int, ...], keys: slice = slice(None)) -> Array | None:
    """Return some keys' columns of a mask; a callable mask is evaluated.

    Parameters
    ----------
    mask : None, array or callable
    shape : (B, H, S_Q, S_KV)
    keys : slice
    """
    if callable(mask):
        b, h, q_index, kv_index = np.ix_(*map(np.arange, shape))
        return np.asarray(mask(b, h, q_index, kv_index[..., keys]))
    return None if mask is None else mask[..., keys]


def masked(s: Array, mask: Array | None) -> Array:
    """Return scores with -inf where a bool mask is False, or with an additive mask added."""
    if mask is None:
        return s
    return np.where(mask, s, -np.inf) if mask.dtype == bool else np.add(s, mask)


def sum_groups(x: Array, H_KV: int) -> Array:
    """Sum over the query heads that share a key-value head: (B, H, ...) -> (B, H_KV, ...)."""
    return np.asarray(x.reshape(x.shape[0], H_KV, x.shape[1] // H_KV, *x.shape[2:]).sum(axis=2))


def draw(case: Case, dtype: str, seed: int = 0) -> Problem:
    """Draw the arrays of a case.

    Parameters
    ----------
    case : Case
    dtype : str
    seed : int

    Returns
    -------
    Problem

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what was given.
    InputError
        dtype is bfloat16, and ml_dtypes is not installed.

    Examples
    --------
    >>> from lvxattn.check import case_of, draw
    >>> problem = draw(case_of("one-query"), "float32", seed=1)
    >>> problem.q.shape, problem.k.shape, problem.q.dtype.name
    ((2, 8, 1, 8), (2, 2, 61, 8), 'float32')
    """
    _validate(case, dtype)
    with np.errstate(all="ignore"):  # half precision may underflow
        return _draw(case, dtype, seed)


@dataclass(frozen=True)
class _Drawn:
    """The arrays drawn so far, to be changed in place."""

    case: Case
    rng: np.random.Generator
    scale: float
    x: dict[str, Array]
    q_kinds: Array
    kv_kinds: Array
    known: dict[str, Array] = field(default_factory=dict)


def _draw(case: Case, dtype: str, seed: int) -> Problem:
    rng = np.random.default_rng([seed, *case.name.encode()])
    x: dict[str, Array] = {
        "q": rng.standard_normal((case.B, case.H, case.S_Q, case.D)),
        "k": rng.standard_normal((case.B, case.H_KV, case.S_KV, case.D)),
        "v": rng.standard_normal((case.B, case.H_KV, case.S_KV, case.D_V)),
        "dout": rng.standard_normal((case.B, case.H, case.S_Q, case.D_V)),
    }
    scale = case.D**-0.5 if case.scale is None else case.scale
    drawn = _Drawn(case, rng, scale, x, np.zeros(case.S_Q, int), np.zeros(case.S_KV, int))
    DATA[case.data](drawn)
    if case.memory == "broadcast":
        for name in ("k", "v", "dout"):
            x[name] = np.broadcast_to(x[name][:, :1], x[name].shape)
    mask = MASKS[case.mask](case, rng)
    target, q_kinds = dtype_of(dtype), drawn.q_kinds
    if isinstance(mask, np.ndarray) and mask.dtype != bool:
        if case.mask == "finite minimum":
            mask = np.maximum(mask, _least(dtype))
            # Their lse is near the number that hides them.
            q_kinds[-1 - len(LOWS) :] = np.arange(1, 2 + len(LOWS))
        mask = mask.astype(target)
    # Results of dead rows are exactly 0: errors there must not hide among those of the others.
    q_kinds[~_alive(mask, case)] = q_kinds.max(initial=0) + 1
    q, k, v, dout = (array.astype(target) for array in x.values())
    kinds = q_kinds, drawn.kv_kinds
    return Problem(case, seed, dtype, q, k, v, dout, scale, mask, *kinds, drawn.known)


def _validate(case: Any, dtype: str) -> None:
    if not isinstance(case, Case):
        raise TypeError(f"case: expected a Case, as of case_of(name), got {case!r:.40}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r:.40}")
    kinds: dict[str, Any] = {"data": DATA, "mask": MASKS, "memory": MEMORY, "calls": CALLS}
    for name, known in kinds.items():
        if getattr(case, name) not in known:
            raise ValueError(
                f"case.{name}: expected one of {', '.join(repr(x) for x in known)}, "
                f"got {getattr(case, name)!r:.40}"
            )
    for name in ("B", "H", "H_KV", "S_Q", "S_KV", "D", "D_V"):
        if not isinstance(getattr(case, name), int) or getattr(case, name) < 1:
            raise ValueError(f"case.{name}: expected at least 1, got {getattr(case, name)!r:.40}")
    if case.H % case.H_KV:
        raise ValueError(f"case.H_KV: expected a divisor of H = {case.H}, got {case.H_KV}")


# Kinds of data.


def _add_to_scores(drawn: _Drawn, q_part: Any, k_part: Any) -> None:
    """Make the first component of q and k add q_part k_part to every score."""
    drawn.x["q"][..., 0] = q_part / drawn.scale**0.5
    drawn.x["k"][..., 0] = k_part / drawn.scale**0.5


def _scores(drawn: _Drawn) -> None:
    sign = np.where(np.arange(drawn.case.S_KV) % 2, 1, -1)
    _add_to_scores(drawn, 600**0.5, drawn.rng.permutation(sign) * 600**0.5)


def _raw(drawn: _Drawn) -> None:
    """Make q k^T at least 65,504, float16's largest number, which the scale brings down to 70."""
    for name in ("q", "k"):
        drawn.x[name] *= 16
        drawn.x[name][..., 0] = 270


def _gaps(drawn: _Drawn) -> None:
    quarter = 4 * np.arange(drawn.case.S_KV) // drawn.case.S_KV
    _add_to_scores(drawn, 8**0.5, -quarter * 8**0.5)
    drawn.kv_kinds[:] = quarter


def _needle(drawn: _Drawn) -> None:
    """Let every other query find the last key, 120 above the other scores."""
    looks = np.arange(drawn.case.S_Q) % 2
    last = np.arange(drawn.case.S_KV) == drawn.case.S_KV - 1
    _add_to_scores(drawn, looks * 120**0.5, last * 120**0.5)
    drawn.q_kinds[:] = looks


def _late(drawn: _Drawn) -> None:
    """Let the last hundredth of the keys have nearly all the weight."""
    late = np.arange(drawn.case.S_KV) >= 0.99 * drawn.case.S_KV
    _add_to_scores(drawn, 14**0.5, late * 14**0.5)


def _uniform(drawn: _Drawn) -> None:
    """Make every score 0, and values whose mean is exact in any dtype."""
    v, dout = drawn.x["v"], drawn.x["dout"]
    drawn.x["q"][:] = 0
    v[:] = drawn.rng.integers(-1, 2, v.shape)
    mean = np.repeat(v.mean(axis=2, keepdims=True), drawn.case.H // drawn.case.H_KV, axis=1)
    drawn.known["out"] = np.broadcast_to(mean, dout.shape)
    drawn.known["lse"] = np.full(dout.shape[:3], log(drawn.case.S_KV))


def _one_hot(drawn: _Drawn) -> None:
    """Give key j the bits of j as signs, and each query 100 times those of the key it looks for."""
    v, case = drawn.x["v"], drawn.case
    bits = np.arange(case.S_KV)[:, None] >> np.arange(case.D) & 1
    code = np.where(np.arange(case.D) < 6, 2.0 * bits - 1, 0)  # 64 keys, six bits
    wanted = drawn.rng.integers(0, case.S_KV, case.S_Q)
    drawn.x["k"][:] = code
    drawn.x["q"][:] = 100 * code[wanted]
    v[:] = drawn.rng.integers(-8, 9, v.shape)
    drawn.known["out"] = np.repeat(v, case.H // case.H_KV, axis=1)[:, :, wanted]
    drawn.known["lse"] = np.full((case.B, case.H, case.S_Q), 600.0 * drawn.scale)


def _hidden(drawn: _Drawn) -> None:
    """Make the scores of entirely hidden rows equal: no rounding changes their plain mean."""
    drawn.x["q"][:, :, -1 - len(LOWS) :] = 0


def _ignored(drawn: _Drawn) -> None:
    """Do the same but in the last row, without gradients, as from padding that a loss ignores."""
    for name in ("q", "dout"):
        drawn.x[name][:, :, -1 - len(LOWS) : -1] = 0


def _aligned(drawn: _Drawn) -> None:
    """Let all parts that queries or keys contribute to a result point the same way."""
    for name in ("q", "dout", "v"):
        x = drawn.x[name]
        shape = (*x.shape[:2], 1, x.shape[3])
        shift = drawn.rng.choice([-1, 1], shape) * drawn.rng.uniform(1, 2, shape)
        drawn.x[name] = shift + (drawn.x["k"] if name == "v" else x / 2)


DATA: dict[str, Callable[[_Drawn], None]] = {
    "gaussian": lambda _drawn: None,
    "scores": _scores,
    "raw": _raw,
    "low": lambda drawn: _add_to_scores(drawn, 800**0.5, -(800**0.5)),
    "high": lambda drawn: _add_to_scores(drawn, 800**0.5, 800**0.5),
    "gaps": _gaps,
    "needle": _needle,
    "late": _late,
    # Over a few of bfloat16's steps: on one of them out would be exact.
    "offset": lambda drawn: drawn.x.update(v=1000 + 16 * drawn.x["v"]),
    "uniform": _uniform,
    "one-hot": _one_hot,
    "hidden rows": _hidden,
    "ignored rows": _ignored,
    "aligned": _aligned,
}


# Kinds of masks.


def _random(case: Case, rng: np.random.Generator, *broadcast: int) -> Array:
    shape = [case.B, case.H, case.S_Q, case.S_KV]
    for axis in broadcast:
        shape[axis] = 1
    visible = rng.random(shape) < 0.6
    visible[..., 0] = True  # every row sees something
    return visible


def _sparse(case: Case, rng: np.random.Generator) -> Array:
    """Show every query two neighbouring keys."""
    first = rng.integers(0, max(1, case.S_KV - 1), (case.B, case.H, case.S_Q, 1))
    keys = np.arange(case.S_KV)
    return np.asarray((keys == first) | (keys == first + 1))


def _expanded(case: Case, rng: np.random.Generator) -> Array:
    return np.broadcast_to(_random(case, rng, 1), (case.B, case.H, case.S_Q, case.S_KV))


def _padding(case: Case, rng: np.random.Generator) -> Array:
    lengths = rng.permutation(np.linspace(case.S_KV // 3, case.S_KV - 1, case.B).astype(int))
    return (np.arange(case.S_KV) < lengths[:, None])[:, None, None]


# Usual numbers that hide entire rows, from the last row but one upwards; -inf: the dtype's minimum.
LOWS = (-1e4, -2e5, -1e9, -1e15, -np.inf)


def _finite_minimum(case: Case, rng: np.random.Generator) -> Array:
    """Return a bias whose hidden entries are -inf: `draw` puts the dtype's minimum there.

    The last row is hidden entirely, by a number that lse can hold beside the scores; those before
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


MASKS: dict[str, Callable[[Case, np.random.Generator], Mask]] = {
    "none": lambda _case, _rng: None,
    "random": _random,
    "over heads": lambda case, rng: _random(case, rng, 1),
    "over batches": lambda case, rng: _random(case, rng, 0),
    "over queries": lambda case, rng: _random(case, rng, 2),
    "two-dimensional": lambda case, rng: _random(case, rng)[0, 0],
    "expanded": _expanded,
    "padding": _padding,
    "finite minimum": _finite_minimum,
    "minus infinity": _minus_infinity,
    "callable": _callable,
    "dead rows": _dead_rows,
    "dead shard": _dead_shard,
    "sparse": _sparse,
    "all dead": lambda case, _rng: np.zeros((case.B, 1, case.S_Q, case.S_KV), bool),
}


def _alive(mask: Mask, case: Case) -> Array:
    """Return which queries see a key in any batch entry and head: (S_Q,), bool."""
    array = mask_array(mask, (case.B, case.H, case.S_Q, case.S_KV))
    if array is None:
        return np.ones(case.S_Q, bool)
    seen = (array if array.dtype == bool else array > -np.inf).any(axis=-1)  # (..., S_Q or 1)
    return np.broadcast_to(seen.reshape(-1, seen.shape[-1]).any(axis=0), case.S_Q)


def _least(dtype: str) -> float:
    """Return the smallest finite number of a dtype."""
    if dtype == "bfloat16":
        return -(2.0**128 - 2.0**120)
    return float(np.finfo(dtype).min)
