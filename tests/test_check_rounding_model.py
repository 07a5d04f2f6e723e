"""The reference with a dtype's roundings: each is present, and there are no others."""

from typing import Any

import numpy as np
import pytest

from lvxattn.check import Case, Problem, case_of, draw
from lvxattn.check.rounding_model import PLAIN, WAYS, Way, rounded_attention
from lvxattn.cli.tensors import dtype_of
from tests.naive import naive_attention
from tests.tolerances import UNIT

Array = np.ndarray[Any, np.dtype[Any]]
CASES = (
    "gaussian",
    "one-key",
    "scores-600",
    "offset-values",
    "grouped-heads",
    "callable-mask",
    "minus-infinity",
    "everything-dead",
    "value-size",
)


def problem_of(
    q: Any, k: Any, v: Any, dout: Any, scale: float = 1.0, dtype: str = "bfloat16"
) -> Problem:
    """Return a problem of one head: q (S_Q, D), k (S_KV, D), v (S_KV, D_V), dout (S_Q, D_V)."""
    q, k, v, dout = (np.array(x, dtype_of(dtype))[None, None] for x in (q, k, v, dout))
    sizes = {"S_Q": q.shape[2], "S_KV": k.shape[2], "D": q.shape[3], "D_V": v.shape[3]}
    case = Case("made", "", "", H=1, H_KV=1, **sizes)
    kinds = np.zeros(q.shape[2], int), np.zeros(k.shape[2], int)
    return Problem(case, 0, dtype, q, k, v, dout, scale, None, *kinds)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_equals_naive_softmax_up_to_rounding(name: str, dtype: str, way: Way) -> None:
    problem = draw(case_of(name), dtype)
    x = problem.astype(np.float64)
    truth = naive_attention(x.q, x.k, x.v, x.scale, x.mask, x.dout, np.zeros(x.q.shape[:3]))
    # Roundings on the way, one u each: q (in every score), p, out, delta, ds and the result.  In
    # the accumulator: sums of S_KV or S_Q terms, taken one by one, and the scores once more.
    u, a, n = UNIT[dtype], UNIT["float32"], max(x.k.shape[2], x.q.shape[2])
    relative = 6 * u + u * truth.largest_score + a * (4 * n + 16 * truth.largest_score)
    tiny = 2.0**-24 if dtype == "float16" else 2.0**-126  # the size of underflows
    for key, got in rounded_attention(problem, way).items():
        assert got.dtype == np.float32
        want = truth.results[key]
        dead = want == -np.inf
        assert (dead == (got == -np.inf)).all()
        bound = relative * truth.sizes[key] + tiny * n * truth.largest_factor
        if key == "lse":
            bound = bound + 4 * a * abs(np.where(dead, 0, want))
        assert (abs(np.where(dead, 0, got - np.where(dead, 0, want))) <= bound).all()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_scaled_queries_are_rounded(way: Way) -> None:
    results = rounded_attention(problem_of([[3]], [[1]], [[1]], [[1]], scale=0.1), way)
    # The bfloat16 next to 0.3, or that next to 0.3 log2(e).
    expected = 0.43359375 * np.log(2) if way.by_log else 0.30078125
    assert results["lse"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("way", [Way(), Way(one_by_one=True)], ids=str)
def test_probabilities_are_rounded(way: Way) -> None:
    # p of the second key is exp(-0.6875) = 0.5028, in bfloat16 0.50390625: the values cancel that.
    problem = problem_of([[1]], [[0], [-0.6875]], [[-0.50390625], [1]], [[1]])
    assert rounded_attention(problem, way)["out"].item() == 0.0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_probabilities_are_rounded_in_the_backward(way: Way) -> None:
    # p of the second key is 0.51562 and 0.51574 for the two queries, both 132 / 256 in bfloat16.
    problem = problem_of([[0.5], [0.50390625]], [[0], [0.125]], [[0], [0]], [[1], [-1]])
    assert rounded_attention(problem, way)["dv"][0, 0, 1, 0] == 0.0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_score_gradients_are_rounded(way: Way) -> None:
    # ds of the first key is 1/4 and 1/4 + 2**-11 for the two queries, which meet it with 1 and -1.
    problem = problem_of([[1], [-1]], [[0], [0]], [[1, 1], [0, 0]], [[1, 0], [1, 2.0**-9]])
    assert rounded_attention(problem, way)["dk"][0, 0, 0, 0] == 0.0


def test_scores_are_rounded_only_if_all_is() -> None:
    problem = problem_of([[1, 1]], [[1, 2.0**-9]], [[1]], [[1]])
    assert all(rounded_attention(problem, w)["lse"].item() == 1 + 2.0**-9
               for w in WAYS if not w.by_log)  # fmt: skip
    assert rounded_attention(problem, PLAIN)["lse"].item() == 1.0


@pytest.mark.parametrize("way", [*WAYS, PLAIN], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_are_rounded_but_not_lse(dtype: str, way: Way) -> None:
    for name, x in rounded_attention(draw(case_of("gaussian"), dtype), way).items():
        rounded = x.astype(dtype_of(dtype)).astype(np.float32)
        assert (x == rounded).all() == (name != "lse")


def test_sums_are_taken_in_the_accumulator() -> None:
    # In half precision 1 + 2**-9 + ... stays 1: of 1024 equal values nothing but 1024 is the sum.
    n = 1024
    problem = problem_of([[0]], [[0]] * n, [[1]] * n, [[1]])
    for way in WAYS:
        results = rounded_attention(problem, way)
        assert results["out"].item() == 1.0
        # Each merge of a piece rounds lse once or twice.
        close = 2 * max(1, way.pieces) * UNIT["float32"] * np.log(n)
        assert abs(results["lse"].item() - np.log(n)) <= close


def test_rounding_models_differ() -> None:
    problem = draw(case_of("gaussian"), "bfloat16")
    found = [rounded_attention(problem, way)["dq"] for way in WAYS]
    found_out = [rounded_attention(problem, way)["out"] for way in WAYS]
    for m in range(len(WAYS)):
        for n in range(m):
            assert (found[m] != found[n]).any() or (found_out[m] != found_out[n]).any()


def test_fp64_is_rounded_as_fp32() -> None:
    problem = draw(case_of("gaussian"), "float64")
    for name, x in rounded_attention(problem, Way()).items():
        same = rounded_attention(draw(case_of("gaussian"), "float32"), Way())[name]
        assert (x == same).all()


def test_half_precision_underflow_does_not_warn() -> None:
    with np.errstate(all="raise"):
        rounded_attention(draw(case_of("lse-low"), "float16"), Way())
