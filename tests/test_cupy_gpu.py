"""mpi_impl on a CUDA device: blocks of CuPy arrays, where there is one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lvxattn.mpi_impl import block_attention, block_attention_backward, kernels
from tests.cases import BF16, CASES, Case
from tests.judge import worst_ratios
from tests.tolerances import limits


def _device() -> Any:
    """Return CuPy if it has a device to compute on, else None."""
    try:
        import cupy

        return cupy if cupy.cuda.runtime.getDeviceCount() else None
    except Exception:  # of CuPy's own kinds, when there is no driver, or of its import
        return None


cupy = _device()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cupy is None, reason="needs a CUDA device and CuPy"),
]

FAST = [
    replace(case, name=f"{case.name}, {dtype}, D = {D}", dtype=dtype, D=D, D_V=D)
    for case in (
        Case("plain"),
        Case("grouped", B=2, H=4, H_KV=2),
        Case("three heads a group", H=3, H_KV=1, S_Q=97, S_KV=257),
        Case("one query", S_Q=1, S_KV=1025),
        Case("one key", S_Q=257, S_KV=1),
        Case("one of each", S_Q=1, S_KV=1),
        Case("many splits", H=1, H_KV=1, S_Q=31, S_KV=20_000),
        Case("many queries", H=1, H_KV=1, S_Q=1025, S_KV=300),
        Case("scores of 30", score=30.0),
    )
    for dtype in ("float16", "bfloat16", "float32")
    for D in (64, 128)
]


@pytest.fixture(autouse=True)
def has_dtype(request: pytest.FixtureRequest) -> None:
    """Skip what this CuPy has no numbers for."""
    if "bfloat16" in request.node.name and int(cupy.__version__.partition(".")[0]) < 14:
        pytest.skip(f"bfloat16 needs CuPy 14, and here is {cupy.__version__}")


def solve(case: Case, kernel: str) -> dict[str, Any]:
    """Return all results of one block on the device."""
    problem = case.make()
    q, k, v, dout = (cupy.asarray(x) for x in (problem.q, problem.k, problem.v, problem.dout))
    mask = cupy.asarray(problem.mask) if isinstance(problem.mask, np.ndarray) else problem.mask
    options = {"scale": problem.scale, "mask": mask, "kernel": kernel}
    out, lse = block_attention(q, k, v, **options)
    delta = (dout.astype(lse.dtype) * out).sum(axis=-1)
    delta -= cupy.asarray(problem.dlse.astype(lse.dtype))
    dk, dv = (cupy.zeros(x.shape, lse.dtype) for x in (k, v))
    dq = block_attention_backward(dout, q, k, v, lse, delta, dk, dv, **options)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {name: cupy.asnumpy(x) for name, x in found.items()}


@pytest.mark.parametrize("case", CASES + BF16, ids=lambda case: case.name)
def test_every_case_on_the_device(case: Case) -> None:
    assert max(worst_ratios(case.make(), solve(case, "auto")).values()) <= 1


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_cuda_kernel_is_as_accurate_as_tiles(case: Case) -> None:
    problem = case.make()
    truth = problem.truth()
    fast, plain = solve(case, "cuda"), solve(case, "tiles")
    for results in (fast, plain):
        assert max(worst_ratios(problem, results, truth).values()) <= 1
    limit = limits(case, truth, case.dtype, "float32")
    for name in fast:
        assert (abs(fast[name].astype(float) - plain[name]) <= 2 * limit[name]).all()


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_the_same_call_gives_the_same_bits(case: Case) -> None:
    first, second = solve(case, "cuda"), solve(case, "cuda")
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_only_keys_in_range_are_read_and_written(dtype: str) -> None:
    case = Case("views", B=2, H=4, H_KV=2, D=64, D_V=64, dtype=dtype)
    problem = case.make()
    whole = solve(case, "cuda")
    q, k, v, dout = (cupy.asarray(x) for x in (problem.q, problem.k, problem.v, problem.dout))
    long = cupy.full((2, 2, 2, 150, 64), cupy.nan, k.dtype)
    at = (slice(None), slice(None), slice(20, 117))
    for x, y in zip(long, (k, v), strict=True):
        x[at] = y
    sums = cupy.zeros(long.shape, cupy.float32)
    views = [x[at] for x in long]
    out, lse = block_attention(q, *views, scale=problem.scale, kernel="cuda")
    delta = (dout.astype(lse.dtype) * out).sum(axis=-1)
    delta -= cupy.asarray(problem.dlse.astype(lse.dtype))
    dq = block_attention_backward(
        dout, q, *views, lse, delta, *(x[at] for x in sums), scale=problem.scale, kernel="cuda"
    )
    found = {"out": out, "lse": lse, "dq": dq, "dk": sums[0][at], "dv": sums[1][at]}
    assert all(np.array_equal(cupy.asnumpy(x), whole[name]) for name, x in found.items())
    for x in sums:
        x[at] = 0
    assert not sums.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_are_rounded_once(dtype: str) -> None:
    problem = Case("narrow", H=4, H_KV=2, S_Q=97, S_KV=257, D=128, D_V=128, dtype=dtype).make()
    q, k, v, dout = (cupy.asarray(x) for x in (problem.q, problem.k, problem.v, problem.dout))
    options = {"scale": problem.scale, "kernel": "cuda"}
    out, lse = block_attention(q, k, v, **options)
    given = dout, q, k, v, lse, (dout.astype(cupy.float32) * out).sum(axis=-1)
    wide, narrow = ([cupy.zeros(x.shape, kind) for x in (k, v)] for kind in (cupy.float32, k.dtype))
    for sums in (wide, narrow):
        block_attention_backward(*given, *sums, **options)
    for x, y in zip(wide, narrow, strict=True):
        assert y.dtype == k.dtype
        assert np.array_equal(cupy.asnumpy(x.astype(k.dtype)), cupy.asnumpy(y))


def test_supported_block_goes_to_cuda_kernel() -> None:
    x = cupy.zeros((1, 1, 64, 128), cupy.float16)
    assert str(kernels.choose(x, x, x, None)) == "cuda: float16, D = 128, no mask"
