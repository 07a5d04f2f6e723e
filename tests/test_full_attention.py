"""The unsharded reference against the naive softmax, finite differences and a bound on memory."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.reference import full_attention, full_attention_backward
from tests.cases import CASES, Case, Problem
from tests.judge import worst_ratios
from tests.tolerances import UNIT, central_difference, limits, summed

MODULE = sys.modules["lvxattn.reference.full_attention"]
TILED = [
    Case("grouped", B=2, H=4, H_KV=2, D_V=5),
    *(
        Case(f"mask {m}", B=2, H=4, H_KV=2, mask=m)
        for m in ("full", "additive", "callable", "padding", "dead rows", "over queries")
    ),
]


def solve_whole(problem: Problem) -> dict[str, Any]:
    options = {"scale": problem.scale, "mask": problem.mask}
    out, lse = full_attention(problem.q, problem.k, problem.v, **options)
    dq, dk, dv = full_attention_backward(
        problem.dout, problem.q, problem.k, problem.v, out, lse, dlse=problem.dlse, **options
    )
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_naive_softmax_and_its_gradients(case: Case) -> None:
    problem = case.make()
    results = solve_whole(problem)
    assert {x.dtype for x in results.values()} == {np.dtype("float64")}
    assert max(worst_ratios(problem, results, fp64=True).values()) <= 1


@pytest.mark.parametrize("rows", [1, 5, 31])
@pytest.mark.parametrize("scores", [1, 700, 4096])
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_tile_size_does_not_change_results(
    case: Case, scores: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scores == 1:
        case = replace(case, S_Q=7, S_KV=11)  # the same, in less time
    monkeypatch.setattr(MODULE, "TILE_SCORES", scores)
    monkeypatch.setattr(MODULE, "TILE_ROWS", rows)
    problem = case.make()
    assert max(worst_ratios(problem, solve_whole(problem), fp64=True).values()) <= 1


def test_scale_is_one_over_the_root_of_D_unless_given() -> None:
    problem = Case("D = 17", D=17).make()
    q, k, v = problem.q, problem.k, problem.v
    for given, same in ((None, 17**-0.5), (2, 2.0)):
        assert np.array_equal(
            full_attention(q, k, v, scale=given)[0], full_attention(q, k, v, scale=same)[0]
        )


def test_dlse_is_zero_unless_given() -> None:
    problem = Case("plain").make()
    q, k, v, dout = problem.q, problem.k, problem.v, problem.dout
    out, lse = full_attention(q, k, v)
    without = full_attention_backward(dout, q, k, v, out, lse)
    with_zeros = full_attention_backward(dout, q, k, v, out, lse, dlse=np.zeros_like(lse))
    assert all(np.array_equal(a, b) for a, b in zip(without, with_zeros, strict=True))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("mask", ["none", "full", "additive", "callable", "dead rows"])
def test_gradients_match_finite_differences(mask: str, name: str) -> None:
    problem = Case("slopes", B=2, H=4, H_KV=2, S_Q=5, S_KV=7, D=3, D_V=2, mask=mask).make()
    truth, step = problem.truth(), 1e-5
    gradient = solve_whole(problem)[f"d{name}"]
    limit = limits(problem.case, truth, "float64", "float64")
    for seed in range(4):
        way = np.random.default_rng(seed).uniform(-1, 1, gradient.shape)

        def loss(t: float, way: Any = way) -> float:
            moved = replace(problem, **{name: getattr(problem, name) + t * way})
            out, lse = full_attention(moved.q, moved.k, moved.v, scale=moved.scale, mask=moved.mask)
            seen = lse > -np.inf
            return float((moved.dout * out).sum() + (moved.dlse * np.where(seen, lse, 0.0)).sum())

        # |way| <= 1: a score moves at most by the sum over D of the other factor, a value by 1.
        other = {"q": problem.k, "k": problem.q, "v": np.zeros(1)}[name]
        rate = problem.scale * abs(other).sum(axis=-1).max()
        allowed = central_difference(
            problem, truth, limit, step, float(rate), value_rate=float(name == "v")
        ) + float(limit[f"d{name}"].sum())
        assert abs((loss(step) - loss(-step)) / (2 * step) - (gradient * way).sum()) <= allowed


LONG = """
import json, resource, sys, time
import numpy as np
from lvxattn.reference import full_attention, full_attention_backward

S_Q, S_KV, D = int(sys.argv[1]), 1_000_000, 64
rng = np.random.default_rng(0)
q, dout = rng.random((1, 1, S_Q, D)), rng.random((1, 1, S_Q, D))
k, v = rng.random((1, 1, S_KV, D)), rng.random((1, 1, S_KV, D))
start = time.perf_counter()
out, lse = full_attention(q, k, v)
dq, dk, dv = full_attention_backward(dout, q, k, v, out, lse)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "arrays": sum(x.nbytes for x in (q, k, v, dout, out, lse, dq, dk, dv)),
    "dv": dv.sum(), "dout": dout.sum(),
}))
"""


@pytest.mark.slow
def test_million_keys_fit_in_2_5_gigabytes() -> None:
    # 100 queries: the peak with 1,000 is the same, since a tile holds as many scores.
    done = subprocess.run(
        [sys.executable, "-c", LONG, "100"], capture_output=True, text=True, check=True, timeout=250
    )
    report = json.loads(done.stdout)
    assert report["arrays"] > 2e9  # keys, values and their gradients
    assert report["peak"] < 2.5e9
    # Every query's probabilities sum to 1, and its share of dv to its dout.
    off = abs(report["dv"] - report["dout"]) / report["dout"]
    assert off <= summed(UNIT["float64"], 100 * 1_000_000)


def test_package_exports_full_attention() -> None:
    assert reference.full_attention is MODULE.full_attention


def test_dead_rows_get_no_gradient() -> None:
    problem = Case("dead", B=2, mask="dead rows").make()
    given, options = (problem.q, problem.k, problem.v), {"mask": problem.mask}
    out, lse = full_attention(*given, **options)
    dead = lse == -np.inf
    dout = np.where(dead[..., None], np.nan, problem.dout)
    got = full_attention_backward(dout, *given, out, lse, **options)
    zero = np.where(dead[..., None], 0.0, problem.dout)
    want = full_attention_backward(zero, *given, out, lse, **options)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)
