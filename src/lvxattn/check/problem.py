"""The arrays of a case: drawn in fp64, rounded to a dtype.

Everything that is judged refers to the rounded arrays, so that rounding them is nobody's error.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.cases import Case
from lvxattn.check.masks import LOWS, MASKS, Mask, seeing
from lvxattn.cli.tensors import dtype_of

Array = npt.NDArray[Any]


MEMORY = ("contiguous", "transposed", "broadcast", "read-only")
CALLS = ("", "other dtype", "other data")
_DTYPES = ("float64", "float32", "float16", "bfloat16")


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
        Rows of one number are judged together.
    known : dict
        Results that need no computing, by name.
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


@dataclass(frozen=True)
class Drawn:
    """What has been drawn so far, to be changed in place."""

    x: dict[str, Array]
    case: Case
    scale: float
    rng: np.random.Generator


def draw(case: Case, dtype: str, seed: int = 0) -> Problem:
    """Make the arrays of a case.

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
    InputError
        bfloat16 is asked for and ml_dtypes is not there.
    """
    with np.errstate(all="ignore"):  # half precision may underflow
        return _draw(case, dtype, seed)


def _draw(case: Case, dtype: str, seed: int) -> Problem:
    _check(case, dtype)
    rng = np.random.default_rng([seed, *case.name.encode()])
    scale = case.D**-0.5 if case.scale is None else case.scale
    x: dict[str, Array] = {
        "q": rng.standard_normal((case.B, case.H, case.S_Q, case.D)),
        "k": rng.standard_normal((case.B, case.H_KV, case.S_KV, case.D)),
        "v": rng.standard_normal((case.B, case.H_KV, case.S_KV, case.D_V)),
        "dout": rng.standard_normal((case.B, case.H, case.S_Q, case.D_V)),
        "q_kinds": np.zeros(case.S_Q, int),
        "kv_kinds": np.zeros(case.S_KV, int),
    }
    DATA[case.data](Drawn(x, case, scale, rng))
    if case.memory == "broadcast":
        for name in ("k", "v", "dout"):
            x[name] = np.broadcast_to(x[name][:, :1], x[name].shape)
    mask = MASKS[case.mask](case, rng)
    target = dtype_of(dtype)
    if isinstance(mask, np.ndarray) and mask.dtype != bool:
        if case.mask == "finite minimum":
            mask = np.maximum(mask, _least(dtype))
            # Their lse is near what hides them.
            x["q_kinds"][-1 - len(LOWS) :] = np.arange(1, 2 + len(LOWS))
        mask = mask.astype(target)
    # Their results are exactly 0: errors there must not hide among those of the others.
    x["q_kinds"][~seeing(mask, case)] = x["q_kinds"].max(initial=0) + 1
    kinds = {"q_kinds": x.pop("q_kinds"), "kv_kinds": x.pop("kv_kinds")}
    known = {name.partition(" ")[2]: x.pop(name) for name in list(x) if name.startswith("known ")}
    arrays = {name: array.astype(target) for name, array in x.items()}
    return Problem(case, seed, dtype, **arrays, scale=scale, mask=mask, **kinds, known=known)


def _check(case: Any, dtype: str) -> None:
    """Refuse a case that somebody made and that is none."""
    if not isinstance(case, Case):
        raise TypeError(f"case: expected a Case, as of case_of(name), got {case!r:.40}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r:.40}")
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


def _gaussian(drawn: Drawn) -> None:
    """Leave everything as it was drawn."""


def _first_component(drawn: Drawn, q_part: Any, k_part: Any) -> None:
    """Let the first component of q and k add q_part k_part to every score."""
    drawn.x["q"][..., 0] = q_part / drawn.scale**0.5
    drawn.x["k"][..., 0] = k_part / drawn.scale**0.5


def _scores(drawn: Drawn) -> None:
    sign = np.where(np.arange(drawn.case.S_KV) % 2, 1, -1)
    _first_component(drawn, 600**0.5, drawn.rng.permutation(sign) * 600**0.5)


def _low(drawn: Drawn) -> None:
    _first_component(drawn, 800**0.5, -(800**0.5))


def _high(drawn: Drawn) -> None:
    _first_component(drawn, 800**0.5, 800**0.5)


def _gaps(drawn: Drawn) -> None:
    quarter = 4 * np.arange(drawn.case.S_KV) // drawn.case.S_KV
    _first_component(drawn, 8**0.5, -quarter * 8**0.5)
    drawn.x["kv_kinds"][:] = quarter


def _needle(drawn: Drawn) -> None:
    """Let every other query find the last key, 120 above what the others score."""
    looks = np.arange(drawn.case.S_Q) % 2
    last = np.arange(drawn.case.S_KV) == drawn.case.S_KV - 1
    _first_component(drawn, looks * 120**0.5, last * 120**0.5)
    drawn.x["q_kinds"][:] = looks


def _offset(drawn: Drawn) -> None:
    """Put values near 1,000, over a few of bfloat16's steps: on one of them out would be exact."""
    drawn.x["v"] = 1000 + 16 * drawn.x["v"]


def _uniform(drawn: Drawn) -> None:
    """Make every score 0, and values whose mean any dtype holds exactly."""
    drawn.x["q"][:] = 0
    drawn.x["v"][:] = drawn.rng.integers(-1, 2, drawn.x["v"].shape)
    mean = np.repeat(
        drawn.x["v"].mean(axis=2, keepdims=True), drawn.case.H // drawn.case.H_KV, axis=1
    )
    drawn.x["known out"] = np.broadcast_to(
        mean, (drawn.case.B, drawn.case.H, drawn.case.S_Q, drawn.case.D_V)
    )
    drawn.x["known lse"] = np.full(
        (drawn.case.B, drawn.case.H, drawn.case.S_Q), log(drawn.case.S_KV)
    )


def _one_hot(drawn: Drawn) -> None:
    """Give key j the bits of j as signs, and each query 100 times those of the key it looks for."""
    bits = np.arange(drawn.case.S_KV)[:, None] >> np.arange(drawn.case.D) & 1
    code = np.where(np.arange(drawn.case.D) < 6, 2.0 * bits - 1, 0)  # 64 keys, six bits
    wanted = drawn.rng.integers(0, drawn.case.S_KV, drawn.case.S_Q)
    drawn.x["k"][:] = code
    drawn.x["q"][:] = 100 * code[wanted]
    drawn.x["v"][:] = drawn.rng.integers(-8, 9, drawn.x["v"].shape)
    drawn.x["known out"] = np.repeat(drawn.x["v"], drawn.case.H // drawn.case.H_KV, axis=1)[
        :, :, wanted
    ]
    drawn.x["known lse"] = np.full(
        (drawn.case.B, drawn.case.H, drawn.case.S_Q), 600.0 * drawn.scale
    )


def _hidden(drawn: Drawn) -> None:
    """Make the scores of rows that are hidden whole equal: no rounding moves their plain mean."""
    drawn.x["q"][:, :, -1 - len(LOWS) :] = 0


def _ignored(drawn: Drawn) -> None:
    """Do so but in the last row; no gradient comes from the others, as from padding in a loss."""
    for name in ("q", "dout"):
        drawn.x[name][:, :, -1 - len(LOWS) : -1] = 0


def _aligned(drawn: Drawn) -> None:
    """Let the parts that some queries or keys contribute to a result all point the same way."""
    for name in ("q", "dout", "v"):
        x = drawn.x[name]
        shift = drawn.rng.choice([-1, 1], (*x.shape[:2], 1, x.shape[3])) * drawn.rng.uniform(
            1, 2, (*x.shape[:2], 1, x.shape[3])
        )
        drawn.x[name] = shift + (drawn.x["k"] if name == "v" else x / 2)


DATA: dict[str, Callable[[Drawn], None]] = {
    "gaussian": _gaussian,
    "scores": _scores,
    "low": _low,
    "high": _high,
    "gaps": _gaps,
    "needle": _needle,
    "offset": _offset,
    "uniform": _uniform,
    "one-hot": _one_hot,
    "hidden rows": _hidden,
    "ignored rows": _ignored,
    "aligned": _aligned,
}


def _least(dtype: str) -> float:
    """Return the smallest finite number of a dtype."""
    if dtype == "bfloat16":
        return -(2.0**128 - 2.0**120)
    return float(np.finfo(dtype).min)
