"""Wrong distributed functions: each one overridden step of a correct one, played on one process.

    rank r:   s_o = scale q_r k_o^T + mask_ro  for every owner o,  out = softmax(s_0 .. s_P-1) v
              what r adds to dk_o, dv_o;  dk_o = the sum over all r

They compute what all ranks return together, from the whole problem and its cut.
"""

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem, masked, sum_groups
from lvxattn.check.shards import Cut, join_parts

Array = npt.NDArray[Any]


class OnRanks:
    """Attention over the ranks' shards of the keys.

    Attributes
    ----------
    name, variants, compare, keeps_state
        As of `KernelBase`.
    problem : Problem
    cut : Cut
    P : int
    rows, keys : list of slice
        The ranks' queries and keys.
    """

    name: ClassVar[str] = ""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    compare: ClassVar[str] = "values"
    keeps_state: ClassVar[bool] = False

    problem: Problem
    cut: Cut
    P: int
    rows: list[slice]
    keys: list[slice]

    def __init_subclass__(cls, name: str = "") -> None:
        """Set the name of a wrong function."""
        cls.name = name

    @np.errstate(all="ignore")
    def results(self, problem: Problem, cut: Cut) -> dict[str, Array]:
        """Return the joined results of all ranks, by name.

        Raises
        ------
        ValueError
            The function's parts would not fit together.
        """
        self.problem, self.cut, self.P = problem, cut, cut.P
        slices = cut.slices(problem.case, problem.seed)
        self.rows, self.keys = [rows for rows, _ in slices], [keys for _, keys in slices]
        group = problem.case.H // problem.case.H_KV
        self.k, self.v = (np.repeat(x, group, axis=1) for x in (problem.k, problem.v))
        found, added = [], []
        for r in range(self.P):
            owners = self._owners(r)
            scores = [self._scores(r, o) for o in owners]
            out, lse = self._attend(r, owners, scores)
            dq, parts = self._gradients(r, owners, scores)
            found.append({"out": out, "lse": lse, "dq": dq})
            added.append(parts)
        H_KV = problem.case.H_KV
        for r in range(self.P):
            dkv = self._sum(added, r)
            for name, x in zip(("dk", "dv"), dkv, strict=True):
                if x.shape[2] != self._length(r):
                    raise ValueError("shards of different lengths")
                found[r][name] = sum_groups(x, H_KV)
        return join_parts(self._returned(found))

    def _length(self, r: int) -> int:
        return int(self.keys[r].stop - self.keys[r].start)

    def _owners(self, r: int) -> list[int]:
        """Return whose keys rank r attends to, in order."""
        return [(r - hop) % self.P for hop in range(self.P)]

    def _scores(self, r: int, o: int) -> Array:
        q, k = self.problem.q[:, :, self.rows[r]], self.k[:, :, self.keys[o]]
        return masked(self.problem.scale * (q @ k.swapaxes(-1, -2)), self._mask(r, o))

    def _mask(self, r: int, o: int) -> Array | None:
        return self._mask_from(self.rows[r], self._first_key(r, o), self._length(o))

    def _first_key(self, _r: int, o: int) -> int:
        """Return where a callable mask is told that the keys begin."""
        return int(self.keys[o].start)

    def _mask_from(self, rows: slice, first_key: int, length: int) -> Array | None:
        mask, case = self.problem.mask, self.problem.case
        if callable(mask):
            q_index = np.arange(rows.start, rows.stop)
            kv_index = np.arange(first_key, first_key + length)
            return np.asarray(
                mask(*np.ix_(np.arange(case.B), np.arange(case.H), q_index, kv_index))
            )
        if mask is None:
            return None
        tile = np.broadcast_to(mask, (case.B, case.H, case.S_Q, case.S_KV))
        return tile[:, :, rows, first_key : first_key + length]

    def _values(self, o: int) -> Array:
        return self.v[:, :, self.keys[o]]

    def _attend(self, _r: int, owners: list[int], scores: list[Array]) -> tuple[Array, Array]:
        p, total, top = _softmax(np.concatenate(scores, axis=-1))
        v = np.concatenate([self._values(o) for o in owners], axis=2)
        return p @ v / np.where(total == 0, 1, total), (top + np.log(total))[..., 0]

    def _gradients(
        self, r: int, owners: list[int], scores: list[Array]
    ) -> tuple[Array, dict[int, tuple[Array, Array]]]:
        """Return dq of rank r, and what it adds to dk and dv of every owner."""
        p, total, _ = _softmax(np.concatenate(scores, axis=-1))
        p = p / np.where(total == 0, 1, total)
        k, v = (
            np.concatenate([x[:, :, self.keys[o]] for o in owners], axis=2)
            for x in (self.k, self.v)
        )
        q, dout = (x[:, :, self.rows[r]] for x in (self.problem.q, self.problem.dout))
        p = p[..., : k.shape[2]]
        dp = dout @ v.swapaxes(-1, -2)
        ds = self.problem.scale * p * (dp - (p * dp).sum(axis=-1, keepdims=True))
        dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout
        ends = np.cumsum([self._length(o) for o in owners])[:-1]
        each = zip(np.split(dk, ends, axis=2), np.split(dv, ends, axis=2), strict=True)
        return ds @ k, dict(zip(owners, each, strict=True))

    def _sum(self, added: list[dict[int, tuple[Array, Array]]], r: int) -> tuple[Array, Array]:
        """Return dk and dv of rank r."""
        parts = [added[s][o] for s, o in self._sources(r) if o in added[s]]
        if not parts:
            return (np.zeros_like(self.k[:, :, self.keys[r]]), np.zeros_like(self._values(r)))
        if len({part[0].shape for part in parts}) > 1:
            raise ValueError("shards of different lengths")
        dk, dv = (np.sum(x, axis=0) for x in zip(*parts, strict=True))
        return dk, dv

    def _sources(self, r: int) -> list[tuple[int, int]]:
        """Return the ranks, and what they add to the keys of whom, that make up dk and dv of r."""
        return [(s, r) for s in range(self.P)]

    def _returned(self, found: list[dict[str, Array]]) -> list[dict[str, Array]]:
        """Return what each rank returns."""
        return found


def _softmax(s: Array) -> tuple[Array, Array, Array]:
    """Return exp(s - top), its sum, and top."""
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(top == -np.inf, 0, top).astype(s.dtype)
    p = np.exp(s - top)
    return p, p.sum(axis=-1, keepdims=True), top


class LastHop(OnRanks, name="last hop missing"):
    """The block of the last hop around the ring is left out."""

    variants = ({"step": 1}, {"step": -1})

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def _hops(self) -> int:
        return max(1, self.P - 1)

    def _owners(self, r: int) -> list[int]:
        return [(r - self.step * hop) % self.P for hop in range(self._hops())]


class LastOddHop(LastHop, name="last hop missing where P is odd"):
    """The ring goes both ways, and at odd P one block is left out."""

    def _hops(self) -> int:
        return super()._hops() if self.P % 2 else self.P


class PowersOfTwo(OnRanks, name="partners of a power of two alone"):
    """Hop n exchanges with rank r ^ n, which some ranks do not have."""

    def _owners(self, r: int) -> list[int]:
        return [o for o in (r ^ hop for hop in range(self.P)) if o < self.P]


class OwnKeysOnly(OnRanks, name="each rank attends to its own keys alone"):
    """No keys are exchanged."""

    def _owners(self, r: int) -> list[int]:
        return [r]


class OwnMask(OnRanks, name="each rank's own mask for every chunk"):
    """Keys rotate without their columns of the mask."""

    def _mask(self, r: int, o: int) -> Array | None:
        if callable(self.problem.mask):
            return super()._mask(r, o)
        own, length = super()._mask(r, r), self._length(o)
        if own is None or own.shape[-1] == length:
            return own
        shown = np.full((*own.shape[:-1], length), own.dtype == bool, own.dtype)
        shown[..., : own.shape[-1]] = own[..., :length]
        return shown


class FirstRow(OnRanks, name="rows of a mask counted from the wrong one"):
    """The number of a query is that in its shard, or is counted from the shard's first key."""

    variants = ({"by_keys": False}, {"by_keys": True})

    def __init__(self, by_keys: bool = False) -> None:
        self.by_keys = by_keys

    def _mask(self, r: int, o: int) -> Array | None:
        if self.by_keys and not callable(self.problem.mask):
            return super()._mask(r, o)
        first = self.keys[r].start if self.by_keys else 0
        rows = slice(first, first + self.rows[r].stop - self.rows[r].start)
        return self._mask_from(rows, self._first_key(r, o), self._length(o))


class FirstKey(OnRanks, name="keys of a callable counted from the wrong one"):
    """The number of a shard's first key is taken for another."""

    variants = tuple({"first": first} for first in ("equal shards", "0", "own", "hop"))

    def __init__(self, first: str = "equal shards") -> None:
        self.first = first

    def _first_key(self, r: int, o: int) -> int:
        right = super()._first_key(r, o)
        if not callable(self.problem.mask):
            return right
        hop = (r - o) % self.P
        starts: dict[str, int] = {
            "equal shards": o * self._length(r),
            "0": 0,
            "own": self.keys[r].start,
            "hop": self.keys[hop].start,
        }
        return starts[self.first]


class WorldRank(OnRanks, name="world rank used for the rank in a group"):
    """A rank takes its number among all that the launcher started for that in its group."""

    variants = tuple({"of": of} for of in ("rows", "keys", "own keys", "queries"))

    def __init__(self, of: str = "rows") -> None:
        self.of = of

    def _start(self, parts: list[slice], r: int) -> int:
        starts: list[int] = [*(part.start for part in parts), parts[-1].stop]
        return starts[min(self.cut.group[r], self.P)]

    def _first_key(self, r: int, o: int) -> int:
        moved = self.of == "keys" or (self.of == "own keys" and o == r)
        if not moved or not callable(self.problem.mask):
            return super()._first_key(r, o)
        return self._start(self.keys, o)

    def _mask(self, r: int, o: int) -> Array | None:
        if self.of != "queries" or not callable(self.problem.mask):
            return super()._mask(r, o)
        first = self._start(self.rows, r)
        rows = slice(first, first + self.rows[r].stop - self.rows[r].start)
        return self._mask_from(rows, self._first_key(r, o), self._length(o))

    def _returned(self, found: list[dict[str, Array]]) -> list[dict[str, Array]]:
        if self.of != "rows":
            return found
        world = [number % self.P for number in self.cut.group]
        return _of_others(found, world, ("out", "lse"))


class MergeWithLse0(OnRanks, name="merge with lse = 0"):
    """Blocks are merged as if their sums were equal."""

    variants = ({"mean": True}, {"mean": False})

    def __init__(self, mean: bool = True) -> None:
        self.mean = mean

    def _attend(self, r: int, owners: list[int], scores: list[Array]) -> tuple[Array, Array]:
        _, lse = super()._attend(r, owners, scores)
        out: Any = 0.0
        for n, (o, s) in enumerate(zip(owners, scores, strict=True)):
            part, _ = super()._attend(r, [o], [s])
            weight = 1 / (n + 1) if self.mean else 0.5 if n else 1
            out = out * (1 - weight) + part * weight
        return out, lse


class EmptyShardSeen(OnRanks, name="a rank without keys has lse 0"):
    """An empty shard counts as a key of score 0 and value 0."""

    def _scores(self, r: int, o: int) -> Array:
        s = super()._scores(r, o)
        return s if self._length(o) else np.zeros((*s.shape[:-1], 1), s.dtype)

    def _values(self, o: int) -> Array:
        v = super()._values(o)
        return v if self._length(o) else np.zeros((*v.shape[:2], 1, v.shape[3]), v.dtype)


class BlindMergeNaN(OnRanks, name="merge of blocks that see nothing is NaN"):
    """The maximum of -inf and -inf is subtracted from them."""

    def _attend(self, r: int, owners: list[int], scores: list[Array]) -> tuple[Array, Array]:
        out, lse = super()._attend(r, owners, scores)
        blind = (scores[0] == -np.inf).all(axis=-1)
        return np.where(blind[..., None], np.nan, out), np.where(blind, np.nan, lse)


class PaddingSeen(OnRanks, name="padding of shorter shards seen"):
    """Shards are padded with zeros to the longest, and the padding is not hidden."""

    def _padded(self, o: int) -> int:
        return max(map(self._length, range(self.P))) - self._length(o)

    def _scores(self, r: int, o: int) -> Array:
        return np.pad(super()._scores(r, o), [(0, 0)] * 3 + [(0, self._padded(o))])

    def _values(self, o: int) -> Array:
        return np.pad(super()._values(o), [(0, 0), (0, 0), (0, self._padded(o)), (0, 0)])


class OthersRows(OnRanks, name="results of a neighbour's queries"):
    """Results travel one rank too far, or not far enough."""

    variants = ({"step": 1}, {"step": -1})

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def _returned(self, found: list[dict[str, Array]]) -> list[dict[str, Array]]:
        others = [(r + self.step) % self.P for r in range(self.P)]
        return _of_others(found, others, ("out", "lse"))


class OthersKeys(OnRanks, name="dk and dv of a neighbour's keys"):
    """Gradients travel one rank too far, or not far enough."""

    variants = ({"step": 1}, {"step": -1})

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def _sources(self, r: int) -> list[tuple[int, int]]:
        return [(s, (r + self.step) % self.P) for s in range(self.P)]


class AgainstKeys(OnRanks, name="dk and dv rotated against the keys"):
    """Gradients travel around the ring in the other direction than their keys."""

    def _sources(self, r: int) -> list[tuple[int, int]]:
        return [(s, (2 * s - r) % self.P) for s in range(self.P)]


class NotSummed(OnRanks, name="dk and dv not summed over ranks"):
    """Each rank keeps what its own queries add to its own keys."""

    def _sources(self, r: int) -> list[tuple[int, int]]:
        return [(r, r)]


class Averaged(OnRanks, name="dk and dv averaged over ranks"):
    """A reduction takes the mean instead of the sum."""

    def _sum(self, added: list[dict[int, tuple[Array, Array]]], r: int) -> tuple[Array, Array]:
        dk, dv = super()._sum(added, r)
        return dk / self.P, dv / self.P


class EqualScatter(OnRanks, name="dk and dv scattered in equal parts"):
    """The sum over ranks is cut as if all shards were equally long."""

    def _sum(self, added: list[dict[int, tuple[Array, Array]]], r: int) -> tuple[Array, Array]:
        every = [super(EqualScatter, self)._sum(added, o) for o in range(self.P)]
        S_KV, length = self.problem.case.S_KV, self._length(r)
        first = min(r * -(-S_KV // self.P), S_KV - length)
        dk, dv = (np.concatenate(x, axis=2) for x in zip(*every, strict=True))
        return dk[:, :, first : first + length], dv[:, :, first : first + length]


class DqOfAll(OnRanks, name="dq summed over ranks"):
    """dq is reduced like dk and dv, though every rank has its own queries."""

    def _returned(self, found: list[dict[str, Array]]) -> list[dict[str, Array]]:
        if len({part["dq"].shape for part in found}) > 1:
            raise ValueError("shards of different lengths")
        total = np.sum([part["dq"] for part in found], axis=0)
        return [{**part, "dq": total} for part in found]


class FirstHeadsMask(OnRanks, name="mask of the first rank's heads for all"):
    """Ranks that share the heads all take the first heads of the mask."""

    def _mask(self, r: int, o: int) -> Array | None:
        tile, H = super()._mask(r, o), self.problem.case.H
        if tile is None or H % self.P:
            return tile
        return np.asarray(tile[:, np.arange(H) % (H // self.P)])


class HeadsLeftOver(OnRanks, name="heads that the ranks do not divide are lost"):
    """Each rank takes H_KV // P heads, and nobody the rest."""

    def _returned(self, found: list[dict[str, Array]]) -> list[dict[str, Array]]:
        case = self.problem.case
        kept = case.H_KV // self.P * self.P
        if not kept:
            raise ValueError("fewer heads than ranks")
        heads = {"dk": kept, "dv": kept}
        for part in found:
            for name, x in part.items():
                x[:, heads.get(name, kept * case.H // case.H_KV) :] = 0
        return found


def _of_others(
    found: list[dict[str, Array]], others: list[int], names: tuple[str, ...]
) -> list[dict[str, Array]]:
    """Return the results in which each rank has another's of these names."""
    for r, o in enumerate(others):
        if any(found[r][name].shape != found[o][name].shape for name in names):
            raise ValueError("shards of different lengths")
    return [{**found[r], **{name: found[o][name] for name in names}} for r, o in enumerate(others)]


ON_RANKS: dict[str, type[OnRanks]] = {
    kernel.name: kernel
    for kernel in list(vars().values())
    if isinstance(kernel, type) and issubclass(kernel, OnRanks) and kernel.name
}
