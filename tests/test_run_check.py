"""The check of a run: what it finds, beside masks of large numbers too, and what it lets pass."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from lvxattn.cli.run_check import check_results
from lvxattn.cli.run_problem import Problem, RandomTensors, Share
from lvxattn.cli.tensors import dtype_of
from lvxattn.common.validation import accumulator
from lvxattn.reference.virtual_ranks import VirtualComm, run_ranks

Array = npt.NDArray[np.generic]
SHAPE = 1, 1, 32, 16  # B, H, S_Q, D
LOWS = {"float16": (-1e4, -65504.0), "bfloat16": (-1e4, -1e9, -1e15)}


@dataclass(frozen=True)
class Made:
    """Tensors, and what a right kernel makes of them in its dtype.

    Attributes
    ----------
    tensors : dict
    total : (B, H, S_Q, 1)
        Of exponentiated scores.
    results : dict
    """

    tensors: dict[str, Array]
    total: Array
    results: dict[str, Array]

    def failed(self, P: int = 2, **wrong: Array) -> set[str]:
        """Return which results fail on P ranks, some of them replaced."""
        results, S_KV = self.results | wrong, self.tensors["k"].shape[2]
        shapes = {name: x.shape for name, x in self.tensors.items()}
        dtype = self.tensors["q"].dtype.name
        problem = Problem("", RandomTensors(0, shapes, dtype), shapes, dtype)

        def rank(comm: VirtualComm) -> set[str]:
            rows, keys = (
                slice(n * comm.rank // P, n * (comm.rank + 1) // P) for n in (SHAPE[2], S_KV)
            )
            of_keys = {"k", "v", "dk", "dv"}
            cut = {
                name: x[:, :, keys if name in of_keys else rows]
                for name, x in (self.tensors | results).items()
                if name != "mask"
            }
            if "mask" in self.tensors:
                cut["mask"] = self.tensors["mask"][..., keys]
            mine = {name: cut[name] for name in results}
            share = Share(rows, keys, {name: cut[name] for name in self.tensors})
            found = check_results(problem, share, mine, comm, scale=0.25, seed=0)
            return {check.name for check in found if not check.passed}

        first, *others = run_ranks(P, rank)
        assert all(other == first for other in others)
        return first


def made(S_KV: int, dtype: str, mask: Array | None = None, *, lost: int | None = None) -> Made:
    """Draw a problem and attend in the accumulator's dtype, without one key if that is said."""
    rng, (B, H, S_Q, D) = np.random.default_rng(0), SHAPE
    q, k, v, dout = (
        rng.standard_normal((B, H, s, D)).astype(dtype_of(dtype)) for s in (S_Q, S_KV, S_KV, S_Q)
    )
    tensors: dict[str, Array] = {"q": q, "k": k, "v": v, "dout": dout}
    if mask is not None:
        tensors["mask"] = mask
    wide = np.dtype(accumulator(dtype))
    wq, wk, wv, wdout = (x.astype(wide) for x in (q, k, v, dout))
    s = wq * wide.type(0.25) @ wk.swapaxes(-1, -2)
    s = s if mask is None else s + mask.astype(wide)
    if lost is not None:
        s[..., lost] = -np.inf
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    out = (p @ wv).astype(q.dtype)
    delta = (wdout * out.astype(wide)).sum(axis=-1, keepdims=True)
    ds = p * (wdout @ wv.swapaxes(-1, -2) - delta) * wide.type(0.25)
    dq, dk, dv = ds @ wk, ds.swapaxes(-1, -2) @ wq, p.swapaxes(-1, -2) @ wdout
    results = {"out": out, "lse": (top + np.log(total))[..., 0]}
    results |= {"dq": dq.astype(q.dtype), "dk": dk.astype(q.dtype), "dv": dv.astype(q.dtype)}
    return Made(tensors, total, results)


@pytest.mark.parametrize(
    ("dtype", "seeing"),
    [
        ("float32", {"out", "lse", "dq"}),
        pytest.param("bfloat16", {"lse"}, marks=pytest.mark.slow),
    ],
)
def test_check_sees_one_lost_key_of_200_000(dtype: str, seeing: set[str]) -> None:
    right, wrong = (made(200_000, dtype, lost=lost) for lost in (None, 123_456))
    assert right.failed() == set()
    of_queries = {name: wrong.results[name] for name in ("out", "lse", "dq")}
    assert right.failed(**of_queries) >= seeing


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_rows_hidden_by_finite_number_are_checked_strictly(dtype: str) -> None:
    least = float(np.finfo(accumulator(dtype)).min)
    for low in LOWS.get(dtype, (-1e4, -1e9, -1e15, least)):
        mask = np.zeros((1, 1, SHAPE[2], 30), dtype_of(dtype))
        mask[:, :, 3:7] = low  # some rows wholly
        mask[:, :, 8:12, ::2] = low  # some partly
        one = made(30, dtype, mask)
        assert one.failed() == set(), low
        # Weights that do not sum to 1, in the hidden rows alone; and too large by n backward.
        out, dq, dv = (one.results[name].copy() for name in ("out", "dq", "dv"))
        for x in (out, dq):
            x[:, :, 3:7] = 2 * x[:, :, 3:7]
        assert one.failed(out=out) - {"dk"} == {"out"}, low  # dk's delta rests on the run's out
        assert one.failed(dq=dq) == {"dq"}, low
        # Unequal shards whose results are averaged in a hidden row.
        values = one.tensors["v"].astype(float)
        out[:, :, 3:7] = ((values[:, :, :5].mean(2) + values[:, :, 5:].mean(2)) / 2)[:, :, None]
        assert "out" in one.failed(out=out), low
        p = (1 / one.total)[:, :, 3:7]
        dout = one.tensors["dout"][:, :, 3:7].astype(float)
        dv += ((1 - p) * dout).sum(axis=2, keepdims=True).astype(dv.dtype)
        assert one.failed(dv=dv) == {"dv"}, low
