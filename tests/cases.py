"""Problems that every implementation must solve, named once.

A `Case` is a recipe: `Case.make` gives the whole problem's arrays, the same on every rank, and
`Case.cuts` says where they are cut for P ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lvxattn.common.handshake import SCHEDULES
from lvxattn.common.segments import Causal, Segments
from tests.naive import Array, Truth, naive_attention

LENGTHS = (1, 31, 63, 97, 257)


@dataclass(frozen=True)
class Case:
    """One problem, its masks and the way it is cut."""

    name: str
    B: int = 1
    H: int = 2
    H_KV: int = 2
    S_Q: int = 31
    S_KV: int = 97
    D: int = 8
    D_V: int = 8
    dtype: str = "float64"
    mask: str = "none"
    score: float = 1.0  # multiplies q: scores are about this large
    shift: float = 0.0  # is added to every score, and so to lse
    offset: float = 0.0  # is added to every value
    cut: str = "even"
    seed: int = 0

    def make(self) -> "Problem":
        """Return the whole problem."""
        rng = np.random.default_rng([self.seed, *self.name.encode()])
        scale = self.D**-0.5

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape)

        q = normal(self.B, self.H, self.S_Q, self.D) * self.score
        k = normal(self.B, self.H_KV, self.S_KV, self.D)
        if self.shift:  # one component of q k^T is the same for all pairs
            q[..., 0] = abs(self.shift) ** 0.5 / scale**0.5
            k[..., 0] = self.shift / abs(self.shift) ** 0.5 / scale**0.5
        v = normal(self.B, self.H_KV, self.S_KV, self.D_V) + self.offset
        dout, dlse = normal(self.B, self.H, self.S_Q, self.D_V), normal(self.B, self.H, self.S_Q)
        q, k, v, dout = (x.astype(_dtype(self.dtype)) for x in (q, k, v, dout))
        mask = MASKS[self.mask](self, rng)
        return Problem(self, q, k, v, dout, dlse, scale, mask)

    def on(self, schedule: str, P: int) -> "Case":
        """Return the case with heads for every rank, where the schedule deals them out."""
        heads = P if schedule == "ulysses" else 1
        return replace(self, H=self.H * heads, H_KV=self.H_KV * heads)

    def cuts(self, P: int) -> tuple[list[int], list[int]]:
        """Return where queries and keys are cut: P + 1 bounds each."""
        return _cuts(self.cut, self.S_Q, P, 1), _cuts(self.cut, self.S_KV, P, 2)


# The ways to distribute a problem: the schedules, and those where one side is whole on all ranks.
WAYS = (*SCHEDULES, "replicated", "replicated keys")
WHOLE = {
    "replicated": ("q", "dout", "dlse", "out", "lse", "dq"),
    "replicated keys": ("k", "v", "mask", "dk", "dv"),
}


def options_of(way: str, P: int) -> dict[str, Any]:
    """Return the arguments of `cross_attention` for one of `WAYS`, on P ranks."""
    side = {"replicated": "queries", "replicated keys": "keys"}.get(way)
    if way == "grid":  # the squarest
        a = min(a for a in range(1, P + 1) if P % a == 0 and a * a >= P)
        return {"schedule": way, "grid": (a, P // a)}
    return {"schedule": way} if side is None else {side: "replicated"}


@dataclass(frozen=True)
class Problem:
    """The whole arrays of a case."""

    case: Case
    q: Array
    k: Array
    v: Array
    dout: Array
    dlse: Array
    scale: float
    mask: Array | Callable[..., Array] | None

    def truth(self) -> Truth:
        """Return the naive results."""
        return naive_attention(self.q, self.k, self.v, self.scale, self.mask, self.dout, self.dlse)

    def part(self, rank: int, P: int, way: str = "") -> dict[str, Any]:
        """Return what one of P ranks holds: q, k, v, dout, dlse and mask; some of it is whole."""
        q_cuts, kv_cuts = self.case.cuts(P)
        rows, keys = slice(*q_cuts[rank : rank + 2]), slice(*kv_cuts[rank : rank + 2])
        mask = self.mask
        if mask is not None and not callable(mask):
            mask = mask[..., keys]
        held = {
            "q": self.q[:, :, rows],
            "k": self.k[:, :, keys],
            "v": self.v[:, :, keys],
            "dout": self.dout[:, :, rows],
            "dlse": self.dlse[:, :, rows],
            "mask": mask,
        }
        return held | {name: getattr(self, name) for name in WHOLE.get(way, ()) if name in held}


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return name


def _random_bool(case: Case, rng: np.random.Generator, *broadcast: int) -> Array:
    shape = [case.B, case.H, case.S_Q, case.S_KV]
    for axis in broadcast:
        shape[axis] = 1
    return rng.random(shape) < 0.6


def _dead_rows(case: Case, rng: np.random.Generator) -> Array:
    mask = _random_bool(case, rng)
    mask[:, :, ::3] = False
    return mask


def _dead_shard(case: Case, rng: np.random.Generator) -> Array:
    mask = _random_bool(case, rng)
    mask[..., : case.S_KV // 2] = False  # with even cuts: everything that the first ranks hold
    return mask


def _padding(case: Case, rng: np.random.Generator) -> Array:
    lengths = rng.integers(0, case.S_KV + 1, case.B)
    return (np.arange(case.S_KV) < lengths[:, None])[:, None, None]


def _additive(case: Case, rng: np.random.Generator) -> Array:
    bias = rng.standard_normal((case.B, 1, case.S_Q, case.S_KV))
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    return bias


def _frames(case: Case, rng: np.random.Generator) -> Callable[..., Array]:
    """A query sees the frames up to its own time; odd heads see every other frame, batch 1 less."""
    ratio = max(1, case.S_KV // max(1, case.S_Q))

    def mask(b: Array, h: Array, q_index: Array, kv_index: Array) -> Array:
        early = kv_index <= ratio * (q_index + 1) - 3 * b
        return early & ((h % 2 == 0) | (kv_index // 5 % 2 == 0))

    return mask


def _documents(case: Case, rng: np.random.Generator, *, earlier: bool = False) -> Segments:
    """Up to 6 documents of any lengths, zero among them."""
    cuts = (np.sort(rng.integers(0, s + 1, 5)) for s in (case.S_Q, case.S_KV))
    bounds = ([0, *cut, s] for cut, s in zip(cuts, (case.S_Q, case.S_KV), strict=True))
    return Segments(*(tuple(np.diff(b)) for b in bounds), earlier=earlier)


MASKS: dict[str, Callable[[Case, np.random.Generator], Any]] = {
    "none": lambda case, rng: None,
    "full": _random_bool,
    "over heads": lambda case, rng: _random_bool(case, rng, 1),
    "over batches": lambda case, rng: _random_bool(case, rng, 0),
    "over queries": lambda case, rng: _random_bool(case, rng, 2),
    "two axes": lambda case, rng: _random_bool(case, rng)[0, 0],
    "padding": _padding,
    "additive": _additive,
    "callable": _frames,
    "dead rows": _dead_rows,
    "dead shard": _dead_shard,
    "all dead": lambda case, rng: np.zeros((1, 1, 1, case.S_KV), bool),
    "documents": _documents,
    "earlier documents": lambda case, rng: _documents(case, rng, earlier=True),
    "causal": lambda case, rng: Causal(case.S_KV - case.S_Q),
    "causal documents": lambda case, rng: _documents(case, rng) & Causal(case.S_KV // 3),
}


def _cuts(kind: str, length: int, P: int, seed: int) -> list[int]:
    if kind == "even":
        return [length * r // P for r in range(P + 1)]
    if kind == "first":  # one rank holds all
        return [0] + [length] * P
    if kind == "last":
        return [0] * P + [length]
    rng = np.random.default_rng([seed, length, P])  # "ragged": any lengths, zero often among them
    inner = sorted(int(x) for x in rng.integers(0, length + 1, P - 1))
    return [0, *inner, length]


def with_dtypes(case: Case, *dtypes: str) -> list[Case]:
    """Return the case in each dtype."""
    return [replace(case, name=f"{case.name}, {dtype}", dtype=dtype) for dtype in dtypes]


def random_case(seed: int) -> Case:
    """Return a case of random sizes, mask, dtype and cut."""
    rng = np.random.default_rng([seed, 20250206])
    H_KV = int(rng.integers(1, 4))

    def length() -> int:  # short ones often, zero now and then
        return int(rng.integers(0, 2 ** rng.integers(1, 10)))

    return Case(
        f"random {seed}",
        B=int(rng.integers(1, 4)),
        H=H_KV * int(rng.integers(1, 5)),
        H_KV=H_KV,
        S_Q=length(),
        S_KV=length(),
        D=int(rng.integers(1, 33)),
        D_V=int(rng.integers(1, 33)),
        dtype=str(rng.choice(["float64", "float32", "float16", "bfloat16"])),
        mask=str(rng.choice(sorted(MASKS))),
        score=float(rng.choice([0.1, 1.0, 30.0])),
        offset=float(rng.choice([0.0, 0.0, 100.0])),
        cut=str(rng.choice(["even", "ragged", "ragged", "first", "last"])),
        seed=seed,
    )


CASES: list[Case] = [
    *with_dtypes(Case("plain"), "float64", "float32", "float16"),
    *with_dtypes(
        Case("grouped", B=2, H=4, H_KV=2, D_V=5, cut="ragged"), "float64", "float32", "float16"
    ),
    Case("one key-value head", H=6, H_KV=1, cut="ragged"),
    Case("D = 1", D=1, D_V=3),
    Case("odd D", D=17, D_V=1),
    *[Case(f"mask {m}", B=2, H=4, H_KV=2, mask=m) for m in MASKS],
    # One between the two: every second case still has every mask.
    Case("two batches, mask over heads, float16", B=2, mask="over heads", dtype="float16"),
    *[
        Case(f"mask {m}, ragged, float32", B=2, H=4, H_KV=2, mask=m, cut="ragged", dtype="float32")
        for m in MASKS
    ],
    *[Case(f"{n} keys", S_KV=n, cut="ragged") for n in LENGTHS],
    *[Case(f"{n} queries", S_Q=n, cut="ragged", mask="full") for n in LENGTHS],
    Case("no keys", S_KV=0),
    Case("no queries", S_Q=0),
    Case("fewer keys than ranks", S_KV=2, S_Q=2),
    Case("all on the first rank", cut="first", mask="full"),
    Case("all on the last rank", cut="last", mask="full"),
    *with_dtypes(Case("scores of 1000", score=1000.0), "float64", "float32"),
    *with_dtypes(Case("lse near 10,000", shift=1e4), "float64", "float32"),
    *with_dtypes(Case("lse near -10,000", shift=-1e4), "float64", "float32"),
    Case("lse near 0", S_KV=8, shift=-2.0, dtype="float32"),
    Case("values near 1000", offset=1e3, dtype="float32"),
]
BF16: list[Case] = [
    replace(case, name=f"{case.name}, bfloat16", dtype="bfloat16")
    for case in (
        Case("plain"),
        Case("grouped", B=2, H=4, H_KV=2, D_V=5),
        *(
            Case(f"mask {m}", B=2, mask=m)
            for m in ("full", "additive", "callable", "dead rows", "documents")
        ),
        Case("257 keys", S_KV=257),
    )
]
