r"""Attention rounded to a dtype wherever a correct kernel may round.

    q'  = round(scale q)              s   = q' k^T + mask
    p   = exp(s - m)                  out = round(sum_j round(p)_j v_j / sum_j p_j)
    ds  = p (dout v^T - delta)        dq  = round(scale round(ds) k)

Inputs, probabilities, score gradients and outputs are rounded to the dtype; scores and sums stay in
the accumulator dtype.  The order of a sum and the number of pieces of the keys are a kernel's
choice, so they are varied (`WAYS`): a correct kernel's error is like that of one of the ways.

Where the rounding is: arXiv:2307.08691, section 3; mixed precision as in tensor cores.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem, masked, sum_groups
from lvxattn.cli.tensors import dtype_of
from lvxattn.common.masks import tiles

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Way:
    """A way to compute attention in a dtype.

    Attributes
    ----------
    pieces : int
        Number of pieces of the keys; the pieces' results are merged.
    by_log : bool
        Whether pieces are merged by the logarithms of their sums, to base 2, for which queries are
        scaled by ``log2(e)`` more: thus rounding ``scale q`` costs a bit even if scale is a power
        of 2.
    one_by_one : bool
        Whether sums are taken term by term, in order, as in a plain loop.
    round_products : bool
        Whether matrix products are rounded to the dtype before they are divided, scaled or summed
        over the heads of a group, as by a library whose products have their factors' dtype.
    round_scores : bool
        Whether scores and probabilities are rounded as well: not correct, but what
        ``softmax(q @ k.T) @ v`` does in half precision.
    """

    pieces: int = 1
    by_log: bool = False
    one_by_one: bool = False
    round_products: bool = False
    round_scores: bool = False


WAYS = (
    Way(),
    Way(pieces=64, by_log=True),
    Way(pieces=8, one_by_one=True),
    Way(round_products=True),
)
PLAIN = Way(round_scores=True)


def rounded_attention(problem: Problem, way: Way) -> dict[str, Array]:
    """Compute out, lse, dq, dk and dv with the roundings of the problem's dtype.

    A float64 problem gets those of float32, whose error is 2**29 times as large.

    Parameters
    ----------
    problem : Problem
    way : Way

    Returns
    -------
    dict
        float32 arrays, by name.
    """
    with np.errstate(all="ignore"):  # half precision may underflow
        return _attend(problem, way)


def _attend(problem: Problem, way: Way) -> dict[str, Array]:
    dtype = "float32" if problem.dtype == "float64" else problem.dtype
    problem = problem.astype(np.float32)
    q, k, v, dout, scale = problem.q, problem.k, problem.v, problem.dout, np.float32(problem.scale)
    group = problem.case.H // problem.case.H_KV
    matmul = _one_by_one if way.one_by_one else np.matmul

    def rounded(x: Array) -> Array:
        return x.astype(dtype_of(dtype)).astype(np.float32)

    def product(x: Array, y: Array) -> Array:
        return rounded(matmul(x, y)) if way.round_products else matmul(x, y)

    def grouped(x: Array) -> Array:  # the rows of all heads that share keys: (B, H_KV, rows, ...)
        return x.reshape(x.shape[0], x.shape[1] // group, group * x.shape[2], *x.shape[3:])

    def over_queries(x: Array, y: Array) -> Array:  # summed over the heads that share keys
        if way.round_products:
            return sum_groups(product(x.swapaxes(-1, -2), y), k.shape[1])
        return matmul(grouped(x).swapaxes(-1, -2), grouped(y))

    def ungrouped(x: Array) -> Array:
        return x.reshape(*q.shape[:3], *x.shape[3:])

    base = np.float32(np.log2(np.e)) if way.by_log else np.float32(1)
    s = ungrouped(matmul(grouped(rounded(base * scale * q)), k.swapaxes(-1, -2))) / base
    s = masked(rounded(s) if way.round_scores else s, problem.dense_mask())
    out = np.zeros(dout.shape, np.float32)
    highest = np.full(out.shape[:3], -np.inf, np.float32)
    total = np.zeros_like(highest)
    for keys in tiles(k.shape[2], max(1, -(-k.shape[2] // way.pieces))):
        top = s[..., keys].max(axis=-1)
        p = np.exp(s[..., keys] - _base(top)[..., None])
        part_total = _stored(_total(p, way), way)
        part = ungrouped(product(grouped(rounded(p)), v[:, :, keys]))
        part /= _divisor(part_total)[..., None]
        out, highest, total = _merge(out, highest, total, part, top, part_total)
        total = _stored(total, way)
    out = rounded(out)
    lse = highest + np.log(total)
    delta = (dout * out).sum(axis=-1)
    # exp(s - lse) in two steps: a large lse has lost how many keys there are.
    p = np.exp(s - _base(highest)[..., None]) / _divisor(total)[..., None]
    p = rounded(p) if way.round_scores else p
    dp = ungrouped(matmul(grouped(dout), v.swapaxes(-1, -2)))
    ds = rounded(p * ((rounded(dp) if way.round_scores else dp) - delta[..., None]))
    return {
        "out": out,
        "lse": lse,
        "dq": rounded(scale * ungrouped(product(grouped(ds), k))),
        "dk": rounded(scale * over_queries(ds, q)),
        "dv": rounded(over_queries(rounded(p), dout)),
    }


def _stored(total: Array, way: Way) -> Array:
    """Return a sum as it is read again."""
    return np.exp(np.log(total)) if way.by_log else total


def _total(p: Array, way: Way) -> Array:
    return np.asarray(np.add.accumulate(p, axis=-1)[..., -1] if way.one_by_one else p.sum(axis=-1))


def _merge(
    out_a: Array, top_a: Array, total_a: Array, out_b: Array, top_b: Array, total_b: Array
) -> tuple[Array, Array, Array]:
    top = np.maximum(top_a, top_b)
    a, b = total_a * np.exp(top_a - _base(top)), total_b * np.exp(top_b - _base(top))
    share_a, share_b = ((x / _divisor(a + b))[..., None] for x in (a, b))
    return share_a * out_a + share_b * out_b, top, a + b


def _base(top: Array) -> Array:
    """Return the number subtracted from scores: their maximum, or 0 where all are -inf."""
    return np.where(top == -np.inf, np.float32(0), top)


def _divisor(total: Array) -> Array:
    return np.where(total > 0, total, np.float32(1))


def _one_by_one(x: Array, y: Array) -> Array:
    """Return x @ y, every sum taken term by term."""
    total = np.zeros((*x.shape[:-1], y.shape[-1]), np.float32)
    for n in range(y.shape[-2]):
        total += x[..., n, None] * y[..., n, None, :]
    return total
