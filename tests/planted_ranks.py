"""A small distributed attention, right and wrong in chosen ways.

It gathers all queries, attends from them to this rank's keys, gathers the parts and merges those of
its own queries: ``rank``, ``size`` and ``allgather`` are all that it needs of a communicator.
"""

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
        ``"merge in half"``, ``"dq in half"`` and ``"dkv in half"`` round what travels after every
        merge; the names of the others say what they do.
    blocks_in_half : bool
        The parts come in the dtype of the inputs, as from a fast kernel: not a fault.
    round_p : bool
        So do probabilities and score gradients: no fault either.
    """

    fault: str = ""
    blocks_in_half: bool = False
    round_p: bool = False

    def __call__(
        self, q: Array, k: Array, v: Array, comm: Any, *, scale: float, mask: Any
    ) -> tuple[Array, Array]:
        """Return this rank's out and lse."""
        self._misbehave(comm)
        dtype, wide = q.dtype, np.result_type(q.dtype, np.float32)
        blocks = comm.allgather(q)
        dropped = self.fault == "last rank dropped" and 0 < comm.rank == comm.size - 1
        columns = self._columns(k, mask, comm)
        first_key = sum(comm.allgather(k.shape[2])[: comm.rank])
        start = np.cumsum([0, *(block.shape[2] for block in blocks)])
        parts = []
        for owner, q_block in enumerate(blocks):
            s = self._scores(q_block, k, columns, scale, start[owner], first_key)
            top = np.maximum(s.max(axis=-1, initial=-np.inf), np.finfo(wide).min)
            p = np.exp(s - top[..., None])
            total = p.sum(axis=-1)
            with np.errstate(divide="ignore"):
                lse = np.where(dropped, -np.inf, top + np.log(total)).astype(wide)
            p = p.astype(dtype).astype(wide) if self.round_p else p
            out = p @ _repeated(v, q, wide) / np.where(total > 0, total, 1)[..., None]
            out = np.where(lse[..., None] == -np.inf, 0, out)
            parts.append((out.astype(dtype) if self.blocks_in_half else out, lse))
        owner = comm.rank
        if self.fault == "neighbour at odd P" and comm.size % 2 and comm.size > 1:
            owner = (owner + 1) % comm.size
        mine = [gathered[owner] for gathered in comm.allgather(parts)]
        out, lse = mine[0][0].astype(wide), mine[0][1]
        for part, part_lse in mine[1:]:
            together = np.logaddexp(lse, part_lse)
            base = np.where(together == -np.inf, 0, together)
            a, b = np.exp(lse - base)[..., None], np.exp(part_lse - base)[..., None]
            if self.fault == "unweighted merge":
                a = b = np.asarray(0.5, wide)
            out, lse = a * out + b * part.astype(wide), together
            if self.fault == "merge in half":
                out = out.astype(dtype).astype(wide)
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
        blocks = comm.allgather((q, dout, lse, delta))
        columns = self._columns(k, mask, comm)
        first_key = sum(comm.allgather(k.shape[2])[: comm.rank])
        start = np.cumsum([0, *(block[0].shape[2] for block in blocks)])
        dq_parts: list[Array] = []
        dkv_parts: list[tuple[Array, Array]] = []
        for owner, (q_block, dout_block, lse_block, delta_block) in enumerate(blocks):
            s = self._scores(q_block, k, columns, scale, start[owner], first_key)
            p = np.exp(s - np.where(lse_block == -np.inf, 0, lse_block)[..., None])
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

    def _misbehave(self, comm: Any) -> None:
        if comm.rank != 1:
            return
        if self.fault == "raises":
            raise ValueError("no such thing")
        if self.fault == "unsupported on one rank":
            raise NotImplementedError("not here")
        if self.fault == "hangs":
            while True:
                time.sleep(0.01)

    def _columns(self, k: Array, mask: Any, comm: Any) -> Any:
        """Return this rank's mask; at fault: rank 0's, where it has as many columns."""
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


def _repeated(x: Array, q: Array, wide: Any) -> Array:
    return np.repeat(x.astype(wide), q.shape[1] // x.shape[1], axis=1)


def _grouped(x: Array, k: Array) -> Array:
    """Sum over the query heads that share keys."""
    group = x.shape[1] // k.shape[1]
    return x.reshape(k.shape[0], k.shape[1], group, *x.shape[2:]).sum(axis=2)
