r"""Compute attention of sampled queries and keys in float64, over all ranks, in the plainest way.

It shares nothing with the results that it checks: no merging by log-sum-exp, no ring, no tiles
whose results are joined.  Every rank goes over its own keys, in pieces so that they fit in memory
as float64, and the ranks' maxima and sums are added in rank order.

    1.  top = max_j s_j
    2.  total = sum_j exp(s_j - top)     lse = top + log total     out = sum_j exp(s_j - top) v_j
                                                                         / total
    3.  with p_j = exp(s_j - top) / total and delta = dout out:
        dq = scale sum_j p_j (dout v_j - delta) k_j

The gradients of a sampled key are sums over the queries of all ranks.  Their delta and lse are the
run's own, samples of which are compared too, except in rows whose lse is too large to hold
log total:

    dv = sum_i p_i dout_i               dk = scale sum_i p_i (dout_i v - delta_i) q_i

With each sum comes its limit, the largest error by rounding, as derived in `rounding`.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple, TypeVar

import numpy as np

from lvxattn.cli.rounding import SIGMAS, Rounding
from lvxattn.cli.run_problem import Share
from lvxattn.cli.tensors import Array
from lvxattn.common.masks import tiles
from lvxattn.common.validation import Communicator

T = TypeVar("T")
# Batch entry, head and position in the whole sequence.
Point = tuple[int, int, int]
_PIECE = 4096


class Bounded(NamedTuple):
    """A result, the limit of its error, and that of the mean error over some rows."""

    value: Array
    limit: Array
    rows: Array = np.zeros(0, int)
    of_mean: float = 0.0


class TwoPass:
    """The sums over one problem.

    Its methods are collective: every rank of comm calls them.

    Parameters
    ----------
    share : Share
        This rank's.
    results : dict
        This rank's parts of the results, by name.
    comm : communicator
    scale : float
    rounding : Rounding
        Of the problem.
    """

    def __init__(
        self,
        share: Share,
        results: dict[str, Array],
        comm: Communicator,
        scale: float,
        rounding: Rounding,
    ) -> None:
        self.share, self.results, self.comm, self.scale = share, results, comm, scale
        self.rounding = rounding
        self.q, self.k, self.v = (share.tensors[name] for name in "qkv")
        self.G = self.q.shape[1] // self.k.shape[1]
        self.dout = share.tensors["dout"] if "dq" in results else None
        mask = share.tensors.get("mask")
        self.mask = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)

    def of_queries(self, points: list[Point]) -> dict[str, Bounded]:
        """Return out, lse and, where gradients are compared, dq of these queries."""
        given = {"q": self.q} | ({} if self.dout is None else {"dout": self.dout})
        rows = self.pick(given, points, self.share.rows)
        q, rounding, N = rows["q"], self.rounding, len(points)
        top, total, moved, alone = self._softmax(q, points)
        seen, total = total > 0, np.where(total > 0, total, 1.0)[:, None]

        out, squares = _Sums(N, self.v.shape[3]), np.zeros((N, 1))
        for n, s, a, across, _, v in self._pieces(q, points):
            e = np.exp(s - top[n, None])
            alike, _, rounded = rounding.probabilities(e, a, top[n, None] - s, across)
            out.add(n, e, alike, rounded, v)
            squares[n, 0] += (rounded**2).sum(axis=1)
        value = self._total(out.value) / total
        # An error of a probability is one of the total, too, and of the mean in proportion.
        out.squares += value**2 * squares
        limit = self._limit(value, out, total)
        limit += (moved + rounding.of_total)[:, None] * abs(value)
        moved, alone = moved + 4 * rounding.u, alone + rounding.adding**2
        lse = np.where(seen, top + np.log(total[:, 0]), -np.inf)
        held, coarse = rounding.u * np.where(seen, abs(lse), 0.0), rounding.coarse(lse)
        fine = np.flatnonzero(seen & ~coarse)
        of_mean = moved[fine].sum() + SIGMAS * np.sqrt((alone + held**2)[fine].sum())
        moved += SIGMAS * np.sqrt(alone)
        truth = {"out": Bounded(value, limit)}
        truth["lse"] = Bounded(lse, moved + 2 * held, fine, of_mean / max(1, len(fine)))
        if self.dout is None:
            return truth

        dout = rows["dout"]
        delta = (dout * value).sum(axis=1)
        of_delta = (abs(dout) * (limit + 4 * rounding.w * abs(value))).sum(axis=1)
        dq, mean = _Sums(N, q.shape[1]), np.zeros(q.shape)
        for n, s, a, across, k, v in self._pieces(q, points):
            p = np.exp(s - top[n, None]) / total[n]
            alike, _, rounded = rounding.probabilities(p, a, top[n, None] - s, across)
            x, size = dout[n] @ v.T - delta[n, None], abs(dout[n]) @ abs(v.T)
            dq.add(n, *rounding.score_gradients(p, alike, rounded, x, size, coarse[n, None]), k)
            mean[n] += p @ k
        value = self._total(dq.value)
        # lse and delta are off for all keys of a row alike.
        limit = self._limit(value, dq) + of_delta[:, None] * abs(self._total(mean))
        limit += (moved + np.where(coarse, 4 * rounding.u, 2 * held))[:, None] * abs(value)
        return truth | {"dq": self._scaled(value, limit)}

    def of_keys(self, points: list[Point]) -> dict[str, Bounded]:
        """Return dk and dv of these keys."""
        rows = self.pick({"k": self.k, "v": self.v}, points, self.share.keys)
        columns, rounding, N = self._mask_columns(points), self.rounding, len(points)
        dk, dv = _Sums(N, self.k.shape[3]), _Sums(N, self.v.shape[3])
        bases = self._bases({(b, h) for b, group, _ in points for h in self._heads(group)})
        for n, (b, group, _) in enumerate(points):
            k, v = (rows[name][n] for name in "kv")
            for h in self._heads(group):
                top, total, moved, coarse = bases[b, h]
                for piece in tiles(self.q.shape[2], _PIECE):
                    q, dout, out = (
                        _wide(x[b, h, piece])
                        for x in (self.q, self.share.tensors["dout"], self.results["out"])
                    )
                    a = abs(self.scale) * (abs(q) @ abs(k))
                    bias = self._bias_of_rows(columns[n], h, piece)
                    s, across = rounding.scores(self.scale * (q @ k), a, bias)
                    p = np.exp(s - top[piece]) / total[piece]
                    alike, _, rounded = rounding.probabilities(p, a, abs(s - top[piece]), across)
                    # A total that is taken anew has an error of its own, and lse a rounding.
                    alike += coarse[piece] * p * (moved[piece] + rounding.of_total + rounding.w)
                    rounded += ~coarse[piece] * p * rounding.u * abs(top[piece])
                    dv.add([n], p, alike, rounded, dout)
                    delta, size = (dout * out).sum(axis=1), abs(dout) @ abs(v)
                    ds, alike, alone = rounding.score_gradients(
                        p, alike, rounded, dout @ v - delta, size, coarse[piece]
                    )
                    alike += p * 4 * rounding.w * (abs(dout) * abs(out)).sum(axis=1)
                    dk.add([n], ds, alike, alone, q)
        dk_value, dv_value = (self._total(x.value) for x in (dk, dv))
        return {
            "dk": self._scaled(dk_value, self._limit(dk_value, dk)),
            "dv": Bounded(dv_value, self._limit(dv_value, dv)),
        }

    def pick(self, arrays: dict[str, Array], points: list[Point], held: slice) -> dict[str, Array]:
        """Return on every rank these points of arrays (B, H, s, ...), of which it holds `held`."""
        mine = {
            n: {name: _wide(x[b, h, i - held.start]) for name, x in arrays.items()}
            for n, (b, h, i) in enumerate(points)
            if held.start <= i < held.stop
        }
        found = self._union(mine)
        return {
            name: np.array([x[name] for x in found]).reshape(len(points), *array.shape[3:])
            for name, array in arrays.items()
        }

    def _union(self, mine: dict[int, T]) -> list[T]:
        """Return all ranks' entries, in the order of their numbers."""
        found: dict[int, T] = {}
        for part in self.comm.allgather(mine):
            found |= part
        return [found[n] for n in sorted(found)]

    def _softmax(self, q: Array, points: list[Point]) -> tuple[Array, ...]:
        """Return the divisors of the queries at these points.

        top, 0 where no key is visible; total; and its relative error: of all keys alike, and the
        squares of each key's own.
        """
        top, sums = np.full(len(q), -np.inf), np.zeros((3, len(q)))
        for n, s, *_ in self._pieces(q, points):
            top[n] = np.maximum(top[n], s.max(axis=1))
        top = self._total(top, np.maximum)
        top = np.where(top == -np.inf, 0.0, top)
        for n, s, a, across, *_ in self._pieces(q, points):
            e = np.exp(s - top[n, None])
            alike, alone, _ = self.rounding.probabilities(e, a, top[n, None] - s, across)
            sums[:, n] += np.array([e, alike, alone**2]).sum(axis=2)
        total, alike, squares = self._total(sums)
        whole = np.where(total > 0, total, 1.0)
        return top, total, alike / whole, squares / whole**2

    def _bases(self, heads: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[Array, ...]]:
        """Return the divisors of my queries of these heads.

        top and total, or the run's lse and 1 where it is accurate enough; the relative error of
        total; and where lse is not accurate enough.
        """
        found: dict[tuple[int, int], tuple[Array, ...]] = {}
        mine = []
        for b, h in sorted(heads):
            lse = _wide(self.results["lse"][b, h])
            coarse = self.rounding.coarse(lse)
            base = np.where(lse == -np.inf, 0.0, lse)
            found[b, h] = base, np.ones_like(lse), np.zeros_like(lse), coarse
            mine += [(b, h, self.share.rows.start + int(i)) for i in np.flatnonzero(coarse)]
        points = sorted(point for part in self.comm.allgather(mine) for point in part)
        q = self.pick({"q": self.q}, points, self.share.rows)["q"]
        top, total, alike, squares = self._softmax(q, points)
        moved = alike + SIGMAS * np.sqrt(squares)
        for (b, h, i), *divisor in zip(points, top, total, moved, strict=True):
            if self.share.rows.start <= i < self.share.rows.stop:
                for x, one in zip(found[b, h], divisor, strict=False):
                    x[i - self.share.rows.start] = one
        return found

    def _pieces(self, q: Array, points: list[Point]) -> Iterator[tuple[Array, ...]]:
        """Yield queries of one head against a piece of my keys, as float64.

        The numbers of the points; their scores, those scores without cancellation, and their
        error at the mask (`Rounding.scores`), each (rows, keys); keys and values.
        """
        order = sorted(range(len(points)), key=lambda n: points[n][:2])
        for (b, h), group in groupby(order, key=lambda n: points[n][:2]):
            n = np.array(list(group))
            for piece in tiles(self.k.shape[2], _PIECE):
                k, v = (_wide(x[b, h // self.G, piece]) for x in (self.k, self.v))
                bias = None
                if self.mask is not None:
                    B, H, rows, _ = self.mask.shape
                    places = np.array([points[i][2] % rows for i in n])
                    bias = self.mask[b % B, h % H, places, piece]
                a = abs(self.scale) * (abs(q[n]) @ abs(k.T))
                s, across = self.rounding.scores(self.scale * (q[n] @ k.T), a, bias)
                yield n, s, a, across, k, v

    def _heads(self, group: int) -> range:
        return range(group * self.G, (group + 1) * self.G)

    def _mask_columns(self, points: list[Point]) -> list[Array] | list[None]:
        """Return on every rank the masks' columns of these keys, each (1 or H, 1 or S_Q)."""
        if self.mask is None:  # on all ranks
            return [None] * len(points)
        held = self.share.keys
        mine = {
            n: self.mask[b % self.mask.shape[0], :, :, j - held.start]
            for n, (b, _, j) in enumerate(points)
            if held.start <= j < held.stop
        }
        return self._union(mine)

    def _bias_of_rows(self, column: Array | None, h: int, piece: slice) -> Array | None:
        """Return the entries of a mask's column for a piece of my queries of head h."""
        if column is None:
            return None
        rows: Array = column[h % len(column)]
        return rows if len(rows) == 1 else rows[self.share.rows][piece]

    def _limit(self, value: Array, sums: "_Sums", total: Array | float = 1.0) -> Array:
        """Return the limit of a sum over all ranks, of which each has `sums` over total."""
        alike, partial = (self._total(x) / total for x in (sums.alike, sums.partial))
        squares, terms = self._total(sums.squares) / total**2, self._total(sums.terms)
        return self.rounding.of_sum(value, alike, squares, partial, terms)

    def _scaled(self, value: Array, limit: Array) -> Bounded:
        return Bounded(self.scale * value, abs(self.scale) * limit + self.rounding.smallest)

    def _total(self, x: Array, op: np.ufunc = np.add) -> Array:
        return np.asarray(op.reduce(self.comm.allgather(x)))  # ranks stay apart: axis 0


class _Sums:
    """Sums of weights times x over this rank, and the parts of their limits.

    Attributes
    ----------
    value, alike, squares, partial : (N, width)
        The sums; sums of their terms' errors of all keys alike, and of the squares of each key's
        own; the largest possible partial sums.
    terms : (N, 1)
        Numbers of terms.
    """

    def __init__(self, N: int, width: int) -> None:
        self.value, self.alike, self.squares, self.partial = np.zeros((4, N, width))
        self.terms = np.zeros((N, 1))

    def add(
        self, n: Array | list[int], weights: Array, alike: Array, alone: Array, x: Array
    ) -> None:
        """Add weights times x to rows n; `alike` and `alone` are the errors of the weights."""
        so_far = abs(self.value[n]) + abs(weights) @ abs(x)
        self.partial[n] = np.maximum(self.partial[n], so_far)
        self.value[n] += weights @ x
        self.alike[n] += alike @ abs(x)
        self.squares[n] += alone**2 @ x**2
        self.terms[n] += len(x)


def _wide(x: Array) -> Array:
    return x.astype(np.float64)
