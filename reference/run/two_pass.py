r"""Attention of sampled queries and keys in float64, over all ranks, as plain as can be.

Nothing here is taken from what it is compared with: no merging by log-sum-exp, no ring, no tiles
whose results would have to be joined.  Every rank goes over its own keys, in pieces so that they
fit in memory as float64, and the ranks' maxima and sums are joined in rank order.

    1.  top = max_j s_j
    2.  total = sum_j exp(s_j - top)     lse = top + log total     out = sum_j exp(s_j - top) v_j
                                                                         / total
    3.  with p_j = exp(s_j - top) / total and delta = dout out:
        dq = scale sum_j p_j (dout v_j - delta) k_j

A sampled key's gradients are sums over the queries of all ranks, with p_i = exp(s_i - lse_i); there
lse and delta are the run's own, of which samples are compared, too:

    dv = sum_i p_i dout_i               dk = scale sum_i p_i (dout_i v - delta_i) q_i
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lvxattn.reference.run.problem import Share
from lvxattn.reference.run.tensors import Array
from lvxattn.reference.validation import Communicator

# Batch entry, head and place in the whole sequence.
Point = tuple[int, int, int]
_PIECE = 16384


class Summed(NamedTuple):
    """A sum, and its size: what it would be if nothing in it cancelled."""

    value: Array
    size: Array


class TwoPass:
    """The sums over one problem.

    Its methods are collective: every rank of comm calls them.

    Parameters
    ----------
    share : Share
        This rank's.
    results : dict
        This rank's parts of what is compared, by name.
    comm : communicator
    scale : float
    """

    def __init__(
        self, share: Share, results: dict[str, Array], comm: Communicator, scale: float
    ) -> None:
        self.share, self.results, self.comm, self.scale = share, results, comm, scale
        self.q, self.k, self.v = (share.tensors[name] for name in "qkv")
        self.G = self.q.shape[1] // self.k.shape[1]
        self.dout = share.tensors["dout"] if "dq" in results else None
        mask = share.tensors.get("mask")
        self.mask = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        # No score is larger even if nothing in it cancels, and no factor of a probability.
        norms = self._total(np.array([_norm(self.q), _norm(self.k)]), np.maximum)
        bias = 0.0 if mask is None or mask.dtype == bool else _largest(mask)
        bias, self.largest_v = self._total(np.array([bias, _largest(self.v)]), np.maximum)
        self.largest_score = float(abs(scale) * norms[0] * norms[1] + bias)
        of_dout = 0.0 if self.dout is None else _largest(self.dout)
        of_dout = float(self._total(np.array(of_dout), np.maximum))
        self.largest_factor = float(np.prod(1 + norms) * (1 + self.largest_v) * (1 + of_dout))

    def of_queries(self, points: list[Point]) -> dict[str, Summed]:
        """Return out, lse and, where gradients are compared, dq of these queries."""
        given = {"q": self.q} | ({} if self.dout is None else {"dout": self.dout})
        rows = self.pick(given, points, self.share.rows)
        q, N, D_V = rows["q"], len(points), self.v.shape[3]

        top = np.full(N, -np.inf)
        for n, s, _, _ in self._pieces(q, points):
            top[n] = np.maximum(top[n], s.max(initial=-np.inf))
        top = self._total(top, np.maximum)
        base = np.where(top == -np.inf, 0.0, top)

        total, out, out_size = np.zeros(N), np.zeros((N, D_V)), np.zeros((N, D_V))
        for n, s, _, v in self._pieces(q, points):
            e = np.exp(s - base[n])
            total[n] += e.sum()
            out[n] += e @ v
            out_size[n] += e @ abs(v)
        total = self._total(total)
        alive = total != 0
        safe = np.where(alive, total, 1.0)
        out, out_size = (self._total(x) / safe[:, None] for x in (out, out_size))
        lse = np.where(alive, base + np.log(safe), -np.inf)
        truth = {"out": Summed(out, out_size), "lse": Summed(lse, np.ones(N))}
        if self.dout is None:
            return truth

        dout = rows["dout"]
        delta, delta_size = (dout * out).sum(axis=1), (abs(dout) * out_size).sum(axis=1)
        dq, dq_size = np.zeros(q.shape), np.zeros(q.shape)
        for n, s, k, v in self._pieces(q, points):
            p = np.exp(s - base[n]) / safe[n]
            dq[n] += self.scale * (p * (v @ dout[n] - delta[n])) @ k
            size = p * (abs(v) @ abs(dout[n]) + delta_size[n])
            dq_size[n] += abs(self.scale) * size @ abs(k)
        return truth | {"dq": Summed(self._total(dq), self._total(dq_size))}

    def of_keys(self, points: list[Point]) -> dict[str, Summed]:
        """Return dk and dv of these keys."""
        rows = self.pick({"k": self.k, "v": self.v}, points, self.share.keys)
        columns = self._mask_columns(points)
        dk, dv = np.zeros(rows["k"].shape), np.zeros(rows["v"].shape)
        dk_size, dv_size = np.zeros_like(dk), np.zeros_like(dv)
        for n, (b, group, _) in enumerate(points):
            k, v = rows["k"][n], rows["v"][n]
            for h in range(group * self.G, (group + 1) * self.G):
                q, dout = _wide(self.q[b, h]), _wide(self.share.tensors["dout"][b, h])
                out, lse = _wide(self.results["out"][b, h]), _wide(self.results["lse"][b, h])
                s = self.scale * (q @ k) + self._bias_of_rows(columns[n], h)
                p = np.exp(s - np.where(lse == -np.inf, 0.0, lse))
                delta = (dout * out).sum(axis=1)
                dv[n] += p @ dout
                dv_size[n] += p @ abs(dout)
                dk[n] += self.scale * (p * (dout @ v - delta)) @ q
                # An element of out may have lost to cancelling what the largest value is, no more.
                size = p * (abs(dout) @ abs(v) + abs(dout).sum(axis=1) * self.largest_v)
                dk_size[n] += abs(self.scale) * size @ abs(q)
        return {
            "dk": Summed(self._total(dk), self._total(dk_size)),
            "dv": Summed(self._total(dv), self._total(dv_size)),
        }

    def pick(self, arrays: dict[str, Array], points: list[Point], held: slice) -> dict[str, Array]:
        """Give every rank these places of arrays (B, H, s, ...), of which it holds `held`."""
        mine = {
            n: {name: _wide(x[b, h, i - held.start]) for name, x in arrays.items()}
            for n, (b, h, i) in enumerate(points)
            if held.start <= i < held.stop
        }
        held_by_all: dict[int, dict[str, Array]] = {}
        for part in self.comm.allgather(mine):
            held_by_all |= part
        return {
            name: np.array([held_by_all[n][name] for n in range(len(points))]).reshape(
                len(points), *x.shape[3:]
            )
            for name, x in arrays.items()
        }

    def _pieces(self, q: Array, points: list[Point]) -> Iterator[tuple[int, Array, Array, Array]]:
        """Yield n, scores (keys,), keys and values of each query q[n] and piece of my keys."""
        for n, (b, h, i) in enumerate(points):
            for start in range(0, self.k.shape[2], _PIECE):
                piece = slice(start, start + _PIECE)
                k, v = (_wide(x[b, h // self.G, piece]) for x in (self.k, self.v))
                s = self.scale * (k @ q[n])
                if self.mask is not None:
                    B, H, rows, _ = self.mask.shape
                    s += _bias(self.mask[b % B, h % H, i % rows, piece])
                yield n, s, k, v

    def _mask_columns(self, points: list[Point]) -> list[Array | None]:
        """Give every rank the masks' columns of these keys, each (1 or H, 1 or S_Q)."""
        if self.mask is None:  # on all ranks
            return [None] * len(points)
        held = self.share.keys
        mine = {
            n: self.mask[b % self.mask.shape[0], :, :, j - held.start]
            for n, (b, _, j) in enumerate(points)
            if held.start <= j < held.stop
        }
        columns: dict[int, Array] = {}
        for part in self.comm.allgather(mine):
            columns |= part
        return [columns[n] for n in range(len(points))]

    def _bias_of_rows(self, column: Array | None, h: int) -> Any:
        """Return what a mask's column adds to the scores of my queries of head h."""
        if column is None:
            return 0.0
        rows = _bias(column[h % len(column)])
        return rows if len(rows) == 1 else rows[self.share.rows]

    def _total(self, x: Array, op: np.ufunc = np.add) -> Array:
        return np.asarray(op.reduce(self.comm.allgather(x)))  # ranks stay apart: axis 0


def _wide(x: Array) -> Array:
    return x.astype(np.float64)


def _bias(mask: Array) -> Array:
    """Return what is added to scores: -inf where a bool mask forbids."""
    return np.where(mask, 0.0, -np.inf) if mask.dtype == bool else _wide(mask)


def _norm(x: Array) -> float:
    """Return the largest Euclidean norm of a row of x."""
    return max((_largest((_wide(m) ** 2).sum(axis=-1)) ** 0.5 for m in _matrices(x)), default=0.0)


def _largest(x: Array) -> float:
    """Return the largest finite magnitude in x."""
    return max(
        (float(abs(_wide(m)).max(initial=0.0, where=np.isfinite(_wide(m)))) for m in _matrices(x)),
        default=0.0,
    )


def _matrices(x: Array) -> Iterator[Array]:
    """Cut an array into pieces that may be widened one at a time."""
    lines = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, 1)
    for start in range(0, len(lines), _PIECE):
        yield lines[start : start + _PIECE]
