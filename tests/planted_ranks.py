"""A small distributed attention, correct or with a planted fault.

It gathers all queries, attends from them to this rank's keys, gathers the parts and merges those of
its own queries.  Its communicator needs only ``rank``, ``size`` and ``allgather``.
"""

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Planted:
    """The attention, with one fault or none; called as `check_distributed` calls functions.

    Attributes
    ----------
    fault : str
        ``"merge in half"``, ``"dq in half"`` and ``"dkv in half"`` round partial sums after every
        merge; ``"world rank"`` and ``"offset of the world rank"`` take the rank among all that the
        launcher started for that in the group; see the code for the others.
    blocks_in_half : bool
        Whether the parts have the dtype of the inputs, as from a fast kernel: not a fault.
    round_p : bool
        Whether probabilities and score gradients have that dtype: not a fault, either.
    """

    fault: str = ""
    blocks_in_half: bool = False
    round_p: bool = False

    def __call__(
        self, q: Array, k: Array, v: Array, comm: Any, *, scale: float, mask: Any
    ) -> tuple[Array, Array]:
        """Return this rank's out and lse."""
        self._fail(comm)
        dtype, wide = q.dtype, np.result_type(q.dtype, np.float32)
        blocks = comm.allgather(q)
        dropped = self.fault == "last rank dropped" and 0 < comm.rank == comm.size - 1
        columns = self._columns(k, mask, comm)
        first_key = self._first_key(k, comm)
        start = np.cumsum([0, *(block.shape[2] for block in blocks)])
        parts = []
        for owner, q_block in enumerate(blocks):
            s = self._scores(q_block, k, columns, scale, start[owner], first_key)
            top = np.maximum(s.max(axis=-1, initial=-np.inf), np.finfo(wide).min)
            p = np.exp(s - top[..., None])
            total = np.where(dropped, 0, p.sum(axis=-1)).astype(wide)
            p = p.astype(dtype).astype(wide) if self.round_p else p
            out = p @ _repeated(v, q, wide) / np.where(total > 0, total, 1)[..., None]
            out = np.where(total[..., None] > 0, out, 0)
            parts.append((out.astype(dtype) if self.blocks_in_half else out, top, total))
        owner = comm.rank
        if self.fault == "neighbour at odd P" and comm.size % 2 and comm.size > 1:
            owner = (owner + 1) % comm.size
        if self.fault == "world rank":
            owner = _world_rank(comm) % comm.size
        mine = [gathered[owner] for gathered in comm.allgather(parts)]
        out, top, total = mine[0][0].astype(wide), *mine[0][1:]
        for part, part_top, part_total in mine[1:]:
            highest = np.maximum(top, part_top)
            a, b = total * np.exp(top - highest), part_total * np.exp(part_top - highest)
            top, total = highest, a + b
            a, b = (x / np.where(total > 0, total, 1) for x in (a, b))
            if self.fault == "unweighted merge":
                a = b = np.full_like(total, 0.5)
            out = a[..., None] * out + b[..., None] * part.astype(wide)
            if self.fault == "merge in half":
                out = out.astype(dtype).astype(wide)
        with np.errstate(divide="ignore"):
            lse = np.where(total > 0, top + np.log(total), -np.inf).astype(wide)
        if self.fault == "another rank's shape" and comm.size > 1:
            return out[:, :, :-1].astype(dtype), lse
        return out.astype(dtype), lse

    def backward(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        lse: Array,
        comm: Any,
        *,
        scale: float,
        mask: Any,
    ) -> tuple[Array, Array, Array]:
        """Return this rank's dq, dk and dv."""
        dtype, wide = q.dtype, lse.dtype
        delta = (dout.astype(wide) * out.astype(wide)).sum(axis=-1)
        blocks = comm.allgather((q, dout, delta))
        columns = self._columns(k, mask, comm)
        first_key = self._first_key(k, comm)
        start = np.cumsum([0, *(block[0].shape[2] for block in blocks)])
        dq_parts: list[Array] = []
        dkv_parts: list[tuple[Array, Array]] = []
        scores = [
            self._scores(block[0], k, columns, scale, start[owner], first_key)
            for owner, block in enumerate(blocks)
        ]
        # lse may have lost the number of keys: the softmax is recomputed.
        tops = comm.allgather([s.max(axis=-1, initial=-np.inf) for s in scores])
        tops = [np.maximum(np.max(x, axis=0), np.finfo(wide).min) for x in zip(*tops, strict=True)]
        own = [np.exp(s - top[..., None]) for s, top in zip(scores, tops, strict=True)]
        totals = [
            np.sum(x, axis=0)
            for x in zip(*comm.allgather([p.sum(axis=-1) for p in own]), strict=True)
        ]
        for owner, (q_block, dout_block, delta_block) in enumerate(blocks):
            total = totals[owner][..., None]
            p = own[owner] / np.where(total > 0, total, 1)
            dout_block = dout_block.astype(wide)
            dp = dout_block @ _repeated(v, q, wide).swapaxes(-1, -2)
            ds = p * (dp - delta_block[..., None])
            if self.round_p:
                p, ds = p.astype(dtype).astype(wide), ds.astype(dtype).astype(wide)
            dq_parts.append(scale * ds @ _repeated(k, q, wide))
            dk = _grouped(scale * ds.swapaxes(-1, -2) @ q_block.astype(wide), k)
            dkv_parts.append((dk, _grouped(p.swapaxes(-1, -2) @ dout_block, k)))
        mine = [gathered[comm.rank] for gathered in comm.allgather(dq_parts)]
        dq = self._sum(mine, dtype, self.fault == "dq in half")
        dk, dv = (
            self._sum(parts, dtype, self.fault == "dkv in half")
            for parts in zip(*dkv_parts, strict=True)
        )
        return dq, dk, dv

    def _fail(self, comm: Any) -> None:
        if self.fault == "raises away from rank 0" and 0 in comm.allgather(_world_rank(comm)):
            return
        if comm.rank != 1:
            return
        if self.fault in ("raises", "raises away from rank 0"):
            raise ValueError("no such thing")
        if self.fault == "unsupported on one rank":
            raise NotImplementedError("not here")
        if self.fault == "hangs":
            while True:
                time.sleep(0.01)

    def _first_key(self, k: Array, comm: Any) -> int:
        rank = _world_rank(comm) if self.fault == "offset of the world rank" else comm.rank
        return sum(comm.allgather(k.shape[2])[:rank])

    def _columns(self, k: Array, mask: Any, comm: Any) -> Any:
        """Return this rank's mask; with the fault, rank 0's, if it has as many columns."""
        if self.fault != "mask of rank 0":
            return mask
        first = comm.allgather(None if callable(mask) else mask)[0]
        fits = first is not None and first.shape[-1] == k.shape[2]
        return first if fits else mask

    def _scores(
        self, q: Array, k: Array, mask: Any, scale: float, start: int, first_key: int
    ) -> Array:
        wide = np.result_type(q.dtype, np.float32)
        s = wide.type(scale) * q.astype(wide) @ _repeated(k, q, wide).swapaxes(-1, -2)
        if mask is None:
            return s
        if callable(mask):
            index = np.ix_(*map(np.arange, s.shape))
            return np.where(mask(*index[:2], index[2] + start, index[3] + first_key), s, -np.inf)
        rows = mask[..., start : start + q.shape[2], :] if mask.shape[-2] > 1 else mask
        if rows.dtype == bool:
            return np.where(rows, s, wide.type(-np.inf))
        return s + rows.astype(wide)

    def _sum(self, parts: Any, dtype: Any, in_half: bool) -> Array:
        total, *others = (x.astype(dtype) if self.blocks_in_half else x for x in parts)
        wide = np.result_type(dtype, np.float32)
        total = total.astype(wide)
        for part in others:
            total = total + part.astype(wide)
            if in_half:
                total = total.astype(dtype).astype(wide)
        return total.astype(dtype)


def _world_rank(comm: Any) -> int:
    """Return this process's number among all that the launcher started."""
    if os.environ.get("RANK"):  # torchrun's
        return int(os.environ["RANK"])
    return int(sys.modules["mpi4py.MPI"].COMM_WORLD.rank) if hasattr(comm, "Split") else comm.rank


def _repeated(x: Array, q: Array, wide: Any) -> Array:
    return np.repeat(x.astype(wide), q.shape[1] // x.shape[1], axis=1)


def _grouped(x: Array, k: Array) -> Array:
    """Sum over the query heads that share keys."""
    group = x.shape[1] // k.shape[1]
    return x.reshape(k.shape[0], k.shape[1], group, *x.shape[2:]).sum(axis=2)
