r"""The error of a result whose partial results are rounded whenever they are sent.

Ranks are virtual and compute in fp64; queries, keys, values and dout are sent unrounded.  Every
rounding has an error of about `one`, relative to what is rounded.  With random values, the h-th of
P equal parts has sqrt(P / h) times the size of the whole while h parts travel together, and weight
h / P in the end, so that the sum is, relative to the result,

    ring     h = 1 .. P - 1, one after the other    one sqrt(sum_h h / P)   = one sqrt((P - 1) / 2)
    gather   P - 1 parts, each rounded once         one sqrt(sum 1 / P)     = one sqrt((P - 1) / P)

and the same for sums, dq, which have no weights.  Rounding lse adds to it: its absolute error is a
relative error in the weight of all that has been merged so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.cli.tensors import dtype_of
from lvxattn.reference import (
    cross_attention,
    cross_attention_backward,
    full_attention,
    full_attention_backward,
    run_ranks,
    shard,
)
from lvxattn.reference.virtual_ranks import VirtualComm

Array = npt.NDArray[Any]


class RoundedResults:
    """A communicator that rounds partial results when they are sent.

    Results differ from blocks of queries in their number of arrays: in a forward, out and a pair
    for lse against q; in a backward, dq against q, dout, lse and delta.

    Parameters
    ----------
    comm : VirtualComm
    dtypes : sequence of str
        A dtype for each array of a result.
    """

    def __init__(self, comm: VirtualComm, dtypes: Sequence[str]) -> None:
        self.rank, self.size, self.host = comm.rank, comm.size, comm.host
        self.recv, self.allgather = comm.recv, comm.allgather
        self._comm, self._dtypes = comm, dtypes

    def send(self, arrays: Sequence[Array], dest: int, tag: int = 0) -> None:
        """Round the arrays if they are a result, and send them."""
        if len(arrays) == len(self._dtypes):
            arrays = [rounded(x, dtype) for x, dtype in zip(arrays, self._dtypes, strict=True)]
        self._comm.send(arrays, dest, tag)


@dataclass(frozen=True)
class Problem:
    """Arguments that are exact in fp16 and bf16, and their results in fp64.

    Every index of the batch axis is a problem of its own.
    """

    q: Array
    k: Array
    v: Array
    dout: Array
    out: Array
    lse: Array
    dq: Array

    @staticmethod
    def random(B: int, H: int, S_Q: int, S_KV: int, D: int, seed: int = 0) -> "Problem":
        """Draw q, k, v and dout from a normal distribution."""
        rng = np.random.default_rng(seed)
        q, k, v, dout = (
            rounded(rounded(rng.standard_normal((B, H, S, D)), "bfloat16"), "float16")
            for S in (S_Q, S_KV, S_KV, S_Q)
        )
        out, lse = full_attention(q, k, v)
        dq, _, _ = full_attention_backward(dout, q, k, v, out, lse)
        return Problem(q, k, v, dout, out, lse, dq)

    def forward(self, P: int, schedule: str, dtypes: Sequence[str]) -> tuple[Array, Array]:
        """Return out and lse of P ranks that send results in these dtypes."""

        def on_a_rank(comm: VirtualComm) -> tuple[Array, Array]:
            wire: Any = RoundedResults(comm, [*dtypes, dtypes[-1]])
            parts = (shard(x, comm) for x in (self.q, self.k, self.v))
            return cross_attention(*parts, wire, schedule=schedule)

        out, lse = zip(*run_ranks(P, on_a_rank), strict=True)
        return np.concatenate(out, axis=2), np.concatenate(lse, axis=2)

    def backward(self, P: int, schedule: str, dtypes: Sequence[str]) -> Array:
        """Return dq of P ranks that send results in this dtype; out and lse are exact."""

        def on_a_rank(comm: VirtualComm) -> Array:
            wire: Any = RoundedResults(comm, dtypes)
            args = (self.dout, self.q, self.k, self.v, self.out, self.lse)
            parts = (shard(x, comm) for x in args)
            return cross_attention_backward(*parts, wire, schedule=schedule)[0]

        return np.concatenate(run_ranks(P, on_a_rank), axis=2)


def errors(result: Array, truth: Array) -> list[float]:
    """Return ||result - truth|| / ||truth|| for every problem: root mean squares, relative."""
    axes = tuple(range(1, truth.ndim))
    off, size = (np.sqrt((x**2).sum(axis=axes)) for x in (result - truth, truth))
    return [float(x) for x in off / size]


def rounded(x: Array, dtype: str) -> Array:
    """Return x rounded to this dtype, in fp64."""
    return x.astype(dtype_of(dtype)).astype(np.float64)
