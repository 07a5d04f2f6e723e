"""The kernels in CUDA C++: compiled for GPUs, and the same source emulated on the CPU."""

import ctypes
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from benchmarks.cuda_kernel import RESULTS, compile_with_nvcc
from lvxattn.mpi_impl import (
    block_attention,
    block_attention_backward,
    cross_attention,
    cross_attention_backward,
    kernels,
)
from lvxattn.mpi_impl.kernels import build, cuda
from lvxattn.mpi_impl.kernels.choose import _warn, unsupported
from tests import fake_cupy
from tests.backends import MPI_DEVICE, host
from tests.cases import Case
from tests.cuda_emulation import SOME_WAYS, Emulator
from tests.errors import says
from tests.judge import ratio, worst_ratios
from tests.test_block_attention import solve_block
from tests.tolerances import UNIT, limits

TO_COMPILE = (("float16", 128), ("bfloat16", 64), ("float32", 128))
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def sized(dtype: str, D: int, name: str = "", **sizes: Any) -> Case:
    """Return a case that the kernels support."""
    return Case(f"{name or sizes} {dtype} {D}", D=D, D_V=D, dtype=dtype, **sizes)


# One tile and a part of one; grouped heads; rows of two heads in one tile; splits and their tails.
CASES = [
    sized("float16", 64, "grouped", B=2, H=4, H_KV=2),
    sized("float16", 64, "1025 keys, 1 query", H=1, H_KV=1, S_Q=1, S_KV=1025),
    sized("float16", 64, "257 queries, 1 key", H=1, H_KV=1, S_Q=257, S_KV=1),
    sized("float16", 64, "one key-value head", H=3, H_KV=1, S_Q=97, S_KV=63),
    sized("float16", 64, "scores of 30", score=30.0),
    sized("bfloat16", 128, "grouped", H=2, H_KV=1, S_Q=33, S_KV=257),
    sized("bfloat16", 128, "1 query, 1 key", S_Q=1, S_KV=1),
    sized("float32", 64, "grouped", B=2, H=4, H_KV=2, S_Q=97, S_KV=257),
    sized("float32", 64, "lse near 10,000", shift=1e4),
    sized("float32", 64, "lse near -10,000", shift=-1e4),
    sized("float32", 64, "scores of 1000", score=1000.0),
    pytest.param(
        sized("float32", 128, "grouped", H=2, H_KV=1, S_Q=31, S_KV=97), marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    found = Emulator(folder)
    with monkeypatch.context() as patch:
        found.install(patch)
        yield found
    cuda.forget()


def device(*arrays: Any) -> list[Any]:
    return [fake_cupy.asarray(x) for x in arrays]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("dtype", "D", "architecture"),
    [
        pytest.param(*build, architecture, marks=[pytest.mark.slow] if n else [])
        for n, (build, architecture) in enumerate(product(TO_COMPILE, (90, 80)))
    ],
)
def test_compiles_without_warnings_or_spills(dtype: str, D: int, architecture: int) -> None:
    found = compile_with_nvcc(dtype, D, architecture)
    assert {key.split()[0] for key in found} == set(build.KERNELS)
    assert {spilled for _, spilled in found.values()} == {0}


def test_recorded_table_matches_tiles() -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in RESULTS.read_text().splitlines()]
    rows = [row for row in rows if set(row[1:2]) & set(build.SCALARS)]
    on_record = {(row[1], int(row[2]), row[3].strip("`")): row[4:8] for row in rows}
    for dtype in build.SCALARS:
        for D in build.HEAD_DIMS:
            for name, tile in build.tiles_of(dtype, D).items():
                shared = tile.shared_bytes(dtype, D)
                sizes = [str(n) for n in (tile.warps, tile.rows, tile.cols)]
                assert on_record[dtype, D, name] == [*sizes, f"{shared:,}"]


@pytest.mark.parametrize(("dtype", "D"), TO_COMPILE)
def test_nvrtc_compiles_without_cuda_headers(dtype: str, D: int) -> None:
    if (nvrtc := _nvrtc()) is None:
        pytest.skip("needs NVRTC, of the package nvidia-cuda-nvrtc")
    for architecture in (80, 90):
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        told = [*build.options(dtype, D), f"--gpu-architecture=sm_{architecture}"]
        text = build.source().encode()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"attention.cu", 0, None, None)
        failed = nvrtc.nvrtcCompileProgram(
            program, len(told), (ctypes.c_char_p * len(told))(*(x.encode() for x in told))
        )
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert (failed, log.value) == (0, b"")
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc() -> Any:
    """Return NVRTC as its package on PyPI has it, for any release of CUDA, or None."""
    spec = find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        for library in sorted(Path(place).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(library))
    return None


@emulated
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_naive_softmax_and_its_gradients(case: Case, emulator: Emulator) -> None:
    problem = case.make()
    results = solve_block(problem, MPI_DEVICE, kernel="cuda")
    assert max(worst_ratios(problem, results).values()) <= 1
    assert {"forward", "backward_q", "backward_kv"} <= {name for name, _ in emulator.launches}


@emulated
def test_split_keys_give_same_results(emulator: Emulator) -> None:
    problem = sized("float16", 64, "splits", H=1, H_KV=1, S_Q=1, S_KV=1025).make()
    solve_block(problem, MPI_DEVICE, kernel="cuda")
    grids = dict(emulator.launches)
    assert grids["forward"][1] > 2
    assert grids["backward_q"][1] > 2
    assert {"merge_splits", "sum_splits"} <= set(grids)


@emulated
@pytest.mark.parametrize(("dtype", "D"), [("float16", 64), ("float32", 64)])
def test_results_do_not_depend_on_warp_order(dtype: str, D: int, emulator: Emulator) -> None:
    case = sized(dtype, D, "orders", H=3, H_KV=1, S_Q=35, S_KV=330)
    problem, found = case.make(), []
    for emulator.how in SOME_WAYS:
        found.append(solve_block(problem, MPI_DEVICE, kernel="cuda"))
    assert max(worst_ratios(problem, found[0]).values()) <= 1
    for results in found[1:]:
        assert all(np.array_equal(results[name], found[0][name]) for name in results)


@emulated
def test_other_tile_sizes_give_same_results(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = {
        "forward": build.Tile(warps=1, row_tiles=1, cols=48, kept=1),
        "backward_q": build.Tile(warps=2, row_tiles=2, cols=16, kept=2),
        "backward_kv": build.Tile(warps=1, row_tiles=2, cols=32, kept=2),
    }
    monkeypatch.setitem(build.TILES, (2, 64), tiles)
    problem = sized("float16", 64, "other tiles", H=4, H_KV=2).make()
    results = solve_block(problem, MPI_DEVICE, kernel="cuda")
    assert max(worst_ratios(problem, results).values()) <= 1


@emulated
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_only_keys_in_range_are_read_and_written(odd: bool, emulator: Emulator) -> None:
    problem = sized("float16", 64, "views", B=2, H=4, H_KV=2).make()
    rng = np.random.default_rng(0)
    q, dout = device(problem.q, problem.dout)
    truth, wide = problem.truth(), np.float32
    out = truth.results["out"]
    delta = ((problem.dout * out).sum(axis=-1) - problem.dlse).astype(wide)
    lse, delta = device(truth.results["lse"].astype(wide), delta)
    # Rows at odd places are copied, or added to by an addition of their own.
    shape = (2, 3, 150, 67 if odd else 72)
    at = slice(None), slice(1, 3), slice(20, 117), slice(0, 64)
    k, v = np.full((2, *shape), np.nan, problem.q.dtype)
    k[at], v[at] = problem.k, problem.v
    dk, dv = before = rng.standard_normal((2, *shape)).astype(wide)
    k, v, dk, dv = device(k, v, dk, dv)
    views = [x[at] for x in (k, v, dk, dv)]
    found = dict(zip(("out", "lse"), block_attention(
        q, *views[:2], scale=problem.scale, kernel="cuda"
    ), strict=True))  # fmt: skip
    found["dq"] = block_attention_backward(
        dout, q, *views[:2], lse, delta, *views[2:], scale=problem.scale, kernel="cuda"
    )
    results = {name: host(x) for name, x in found.items()}
    limit = limits(problem.case, truth, "float16", "float32")
    assert all(ratio(x, truth.results[name], limit[name]) <= 1 for name, x in results.items())
    for name, x, b in (("dk", host(dk), before[0]), ("dv", host(dv), before[1])):
        # Added to numbers of size 1 to 4: rounded to those.
        added = limit[name] + 4 * UNIT["float32"] * (abs(b[at]) + 4)
        assert ratio(x[at].astype(float) - b[at], truth.results[name], added) <= 1
        x[at] = b[at]
        assert np.array_equal(x, b)


@emulated
@pytest.mark.parametrize("kernel", ["cuda", "tiles"])
@pytest.mark.parametrize(("dtype", "D"), [("float16", 64), ("bfloat16", 128)])
def test_16_bit_gradients_are_rounded_once(
    dtype: str, D: int, kernel: str, emulator: Emulator
) -> None:
    problem = sized(dtype, D, "narrow", H=2, H_KV=1, S_Q=300, S_KV=40).make()
    truth = problem.truth().results
    rows = [truth["lse"].astype(np.float32), (problem.dout * truth["out"]).sum(-1, np.float32)]
    place = device if kernel == "cuda" else lambda *x: list(x)  # NumPy has tiles of 256 rows
    given = place(problem.dout, problem.q, problem.k, problem.v, *rows)
    there = np.random.default_rng(0).standard_normal((2, *problem.k.shape)).astype(problem.k.dtype)

    def add(sums: Any, dtype: Any) -> Any:
        found = place(*sums.astype(dtype))
        block_attention_backward(*given, *found, scale=problem.scale, kernel=kernel)
        return np.stack([host(x) for x in found])

    wide = add(np.zeros_like(there), np.float32)
    narrow = add(np.zeros_like(there), there.dtype)
    assert narrow.dtype == there.dtype
    assert np.array_equal(narrow, wide.astype(there.dtype))
    # What is there already is added to, and the sum is rounded.
    unit, added = UNIT[dtype], add(there, there.dtype).astype(float)
    exact = there.astype(float) + wide
    assert (abs(added - exact) <= 2 * unit * (abs(exact) + abs(wide))).all()


@emulated
def test_single_rank_gradients_have_dtype_of_keys(emulator: Emulator) -> None:
    problem = sized("float16", 64, "memory", H=1, H_KV=1, S_Q=2, S_KV=2048).make()
    q, k, v, dout = device(*(getattr(problem, x) for x in ("q", "k", "v", "dout")))
    out, lse = cross_attention(q, k, v, MPI.COMM_SELF)
    tracemalloc.start()
    try:
        _, dk, dv = cross_attention_backward(dout, q, k, v, out, lse, MPI.COMM_SELF)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (dk.dtype, dv.dtype) == (k.dtype, v.dtype)
    # fake_cupy's zeros are made twice, one array at a time.  In fp32 it would be 2 and more.
    assert peak <= 1.75 * (dk.nbytes + dv.nbytes)


@emulated
@pytest.mark.parametrize(("factor", "keys"), [(1.0, 1e6), (1e-6, 1e6), (1e4, 97)])
def test_fp16_gradients_of_any_magnitude(factor: float, keys: float, emulator: Emulator) -> None:
    # All keys but 97 are elsewhere: lse is larger by log(keys / 97), every p about 1 / keys.
    case = sized("float16", 64, "one of many keys", H=2, H_KV=1)
    problem = case.make()
    problem = replace(problem, dout=problem.dout * np.float16(factor))
    far = np.log(keys / case.S_KV)
    truth = problem.truth()
    lse = (truth.results["lse"] + far).astype(np.float32)
    dout, q, k, v = (x.astype(np.float64) for x in (problem.dout, problem.q, problem.k, problem.v))
    delta = np.full(lse.shape, 0.25 * factor, np.float32)
    p = np.exp(problem.scale * np.einsum("bhid,bgjd->bhij", q, k) - lse[..., None])
    dp = np.einsum("bhid,bgjd->bhij", dout, v) - delta[..., None]
    ds = p * dp
    size = p * (np.einsum("bhid,bgjd->bhij", abs(dout), abs(v)) + delta[..., None])
    scale = problem.scale
    want = {
        "dq": (scale * np.einsum("bhij,bgjd->bhid", ds, k),
               scale * np.einsum("bhij,bgjd->bhid", size, abs(k))),
        "dk": (scale * np.einsum("bhij,bhid->bjd", ds, q)[:, None],
               scale * np.einsum("bhij,bhid->bjd", size, abs(q))[:, None]),
        "dv": (np.einsum("bhij,bhid->bjd", p, dout)[:, None],
               np.einsum("bhij,bhid->bjd", p, abs(dout))[:, None]),
    }  # fmt: skip
    dk, dv = (fake_cupy.zeros(x.shape, np.float32) for x in (k, v))
    dq = block_attention_backward(
        *device(problem.dout, problem.q, problem.k, problem.v, lse, delta), dk, dv,
        scale=scale, kernel="cuda",
    )  # fmt: skip
    # Each p, ds and dout v is rounded once, to 16 bits or to fp32 as `limits` says.
    score = (case.D + 2) * truth.largest_score * UNIT["float32"]
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        exact, whole = want[name]
        assert ratio(host(x), exact, (UNIT["float16"] + 2 * score + 1e-5) * whole) <= 1


@emulated
def test_dead_query_adds_nothing(emulator: Emulator) -> None:
    problem = sized("float16", 64, "dead rows", H=1, H_KV=1, S_Q=5, S_KV=31).make()
    lse = np.array(problem.truth().results["lse"], np.float32)
    q, k, v, dout, delta = problem.q, problem.k, problem.v, problem.dout, np.zeros_like(lse)
    lse[..., 2], dout[:, :, 2] = -np.inf, 0

    def gradients(rows: Any) -> list[Any]:
        dk, dv = (fake_cupy.zeros(x.shape, np.float32) for x in (k, v))
        given = (dout[:, :, rows], q[:, :, rows], k, v, lse[:, :, rows], delta[:, :, rows])
        dq = block_attention_backward(
            *device(*given), dk, dv, scale=problem.scale, kernel="cuda"
        )  # fmt: skip
        return [host(x) for x in (dq, dk, dv)]

    q[:, :, 2] *= 1e3  # exp of its scores would be infinite
    with_it, without = gradients([0, 1, 2, 3, 4]), gradients([0, 1, 3, 4])
    assert not with_it[0][:, :, 2].any()
    for x, y in zip(with_it[1:], without[1:], strict=True):
        assert np.allclose(x, y, rtol=0, atol=1e-5)


@emulated
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("dtype", "D"), [("float16", 64), ("float32", 64)])
def test_nan_stays_in_its_row_or_head(dtype: str, D: int, bad: float, emulator: Emulator) -> None:
    problem = sized(dtype, D, "NaN", H=4, H_KV=2, S_Q=5).make()
    clean = solve_block(problem, MPI_DEVICE, kernel="cuda")
    problem.q[0, 1, 3, 0] = bad
    problem.v[0, 1, 90, 7] = bad
    found = solve_block(problem, MPI_DEVICE, kernel="cuda")
    hit = np.zeros(problem.q.shape[:3], bool)
    hit[0, 1, 3] = True
    assert np.isnan(found["lse"][hit]).all()
    assert np.array_equal(found["lse"][~hit], clean["lse"][~hit])
    hit[0, 2:] = True
    for name in ("out", "dq"):
        assert np.array_equal(found[name][~hit], clean[name][~hit])
        assert not np.isfinite(found[name][hit]).all(axis=-1).any()


@emulated
@pytest.mark.parametrize("unseen", [70, 330])
def test_minus_infinity_scores_hide_keys(unseen: int, emulator: Emulator) -> None:
    case = sized("float32", 64, "minus infinity", H=2, H_KV=1, S_Q=3, S_KV=330)
    problem = case.make()
    problem.q[..., 0] = 1
    keys, values = (x[:, :, unseen:] for x in (problem.k, problem.v))
    seen = replace(problem, k=keys, v=values).truth()
    problem.k[:, :, :unseen, 0] = -np.inf
    q, k, v = device(problem.q, problem.k, problem.v)
    found = block_attention(q, k, v, scale=problem.scale, kernel="cuda")
    limit = limits(case, seen, "float32", "float32")
    for name, x in zip(("out", "lse"), found, strict=True):
        assert ratio(host(x).astype(float), seen.results[name], limit[name]) <= 1


@emulated
def test_mpi_pass_chooses_cuda_kernel(emulator: Emulator) -> None:
    problem = sized("float16", 64, "a pass", H=4, H_KV=2).make()
    q, k, v, dout, dlse = device(*(getattr(problem, x) for x in ("q", "k", "v", "dout", "dlse")))
    comm, scale = MPI.COMM_SELF, problem.scale
    out, lse = cross_attention(q, k, v, comm, scale=scale)
    dlse = dlse.astype(np.float32)
    gradients = cross_attention_backward(dout, q, k, v, out, lse, comm, scale=scale, dlse=dlse)
    results = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))
    ratios = worst_ratios(problem, {name: host(x) for name, x in results.items()})
    assert max(ratios.values()) <= 1
    assert {"forward", "backward_q", "backward_kv"} <= {name for name, _ in emulator.launches}


@emulated
def test_progress_is_called_once_per_launch(emulator: Emulator) -> None:
    calls: list[int] = []
    problem = sized("float16", 64, "progress").make()
    solve_block(problem, MPI_DEVICE, kernel="cuda", progress=lambda: calls.append(1))
    assert len(calls) == 2


REFUSED = [
    (replace(CASES[0], mask="full"), "no mask, got ndarray"),
    (replace(CASES[0], mask="callable"), "no mask, got function"),
    (replace(CASES[0], dtype="float64"), "one of float16, bfloat16, float32, got float64"),
    (replace(CASES[0], D=65), "D = D_V in (64, 128), got D = 65, D_V = 64"),
    (replace(CASES[0], D_V=128), "D = D_V in (64, 128), got D = 64, D_V = 128"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda x: x if type(x) is str else "")
def test_unsupported_input_raises_or_falls_back_to_tiles(
    case: Case, reason: str, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = case.make()
    q, k, v = device(problem.q, problem.k, problem.v)
    mask = problem.mask if callable(problem.mask) else None
    if problem.mask is not None and mask is None:
        (mask,) = device(problem.mask)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        block_attention(q, k, v, scale=1.0, mask=mask, kernel="cuda")
    text = f"'cuda' expects {reason}"
    assert str(raised.value) == f"kernel: {text}"
    block_attention(q, k, v, scale=1.0, mask=mask)
    monkeypatch.setenv("LVXATTN_KERNEL", "cuda")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        block_attention(q, k, v, scale=1.0, mask=mask)
    assert str(raised.value) == f"LVXATTN_KERNEL: {text}"
    assert not emulator.launches


def test_kernel_depends_on_compute_capability(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = CASES[0].make()
    given = device(problem.q, problem.k, problem.v)
    assert unsupported(fake_cupy, *given, None) is None
    assert "numpy" in str(unsupported(np, problem.q, problem.k, problem.v, None))
    other = [*given[:2], *device(problem.v.astype(np.float32))]
    assert unsupported(fake_cupy, *other, None) == (
        "k and v of q's float16, got float16 and float32"
    )
    many = device(*np.zeros((3, 2**15, 2, 1, 64), np.float16))
    assert unsupported(fake_cupy, *many, None) == "B H_KV of at most 65535, got 65536"
    small = build.Tile(warps=8, row_tiles=2, cols=256, kept=2)
    with monkeypatch.context() as patch:
        patch.setitem(build.TILES, (2, 64), {"forward": small})
        assert unsupported(fake_cupy, *given, None) == (
            f"a device with {small.shared_bytes('float16', 64)} bytes of shared memory a block, "
            "got 166912"
        )
    with monkeypatch.context() as patch:  # undone before what the emulator has patched
        patch.setattr(fake_cupy.Device, "compute_capability", "75")
        assert unsupported(fake_cupy, *given, None) == (
            "a device of compute capability 8.0 or more, got 7.5"
        )


@emulated
@pytest.mark.parametrize(
    ("variable", "argument", "taken"),
    [
        (None, "auto", "cuda: float16, D = 64, no mask"),
        ("", "auto", "cuda: float16, D = 64, no mask"),
        ("cuda", "auto", "cuda: LVXATTN_KERNEL=cuda"),
        ("tiles", "auto", "tiles: LVXATTN_KERNEL=tiles"),
        ("tiles", "cuda", "cuda: kernel=cuda"),
        ("cuda", "tiles", "tiles: kernel=tiles"),
    ],
)
def test_argument_overrides_environment(
    variable: str | None,
    argument: str,
    taken: str,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("LVXATTN_KERNEL", variable)
    problem = CASES[0].make()
    given = device(problem.q, problem.k, problem.v)
    assert str(kernels.choose(*given, None, argument)) == taken
    solve_block(problem, MPI_DEVICE, kernel=argument)
    assert bool(emulator.launches) == taken.startswith("cuda")


def test_unknown_kernel_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((1, 1, 1, 64))
    with pytest.raises(ValueError, match=r"^kernel: expected auto, cuda or tiles, got 'fast'$"):
        block_attention(x, x, x, scale=1.0, kernel="fast")
    monkeypatch.setenv("LVXATTN_KERNEL", "Tiles")
    with pytest.raises(ValueError, match=says("LVXATTN_KERNEL", "'Tiles'")):
        block_attention(x, x, x, scale=1.0)


def test_variable_does_not_apply_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_KERNEL", "cuda")
    x = np.ones((1, 1, 1, 64))
    out, _ = block_attention(x, x, x, scale=1.0)
    assert np.array_equal(out, x)
    with pytest.raises(ValueError, match=says("kernel", "'cuda'", "numpy")):
        block_attention(x, x, x, scale=1.0, kernel="cuda")


@pytest.mark.parametrize("empty", ["S_Q", "S_KV"])
def test_empty_shard_launches_no_kernel(empty: str, emulator: Emulator) -> None:
    problem = sized("float16", 64, **{empty: 0}).make()
    results = solve_block(problem, MPI_DEVICE, kernel="cuda")
    assert not results["out"].any()
    assert not emulator.launches


class CompileError(Exception):
    """As CuPy's own: derived from nothing closer."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError('Failure finding "libnvrtc.so.13"'), 'RuntimeError: Failure finding "libnv'),
        (
            CompileError("\nattention.cu(3): error\n and more"),
            "CompileError: attention.cu(3): error)",
        ),
    ],
)
def test_failed_compilation_warns_once_and_falls_back_to_tiles(
    error: Exception, line: str, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fail(**given: Any) -> Any:
        tried.append(1)
        raise error

    monkeypatch.setattr(fake_cupy, "RawModule", fail)
    _warn.cache_clear()
    problem = CASES[0].make()
    with pytest.warns(RuntimeWarning) as told:
        results = solve_block(problem, MPI_DEVICE, kernel="auto")  # two blocks
    assert max(worst_ratios(problem, results).values()) <= 1
    assert [line in str(each.message) for each in told] == [True]
    q, k, v = device(problem.q, problem.k, problem.v)
    assert line in kernels.choose(q, k, v, None).why
    with pytest.raises(RuntimeError, match="kernel: 'cuda' cannot be compiled") as raised:
        block_attention(q, k, v, scale=1.0, kernel="cuda")
    assert raised.value.__cause__ is error  # with all that the compiler says
    assert len(tried) == 1


@pytest.mark.parametrize("s_kv", [1, 100, 5000, 75_000, 1_000_000])
@pytest.mark.parametrize("rows", [1, 256, 8192])
@pytest.mark.parametrize("processors", [1, 132])
def test_splits_cover_keys_and_fill_the_device(processors: int, rows: int, s_kv: int) -> None:
    for name, tile in build.tiles_of("float16", 128).items():
        if name == "backward_kv":
            continue
        splits, keys = cuda.splits_of(tile, 8, rows, s_kv, processors)
        assert (splits - 1) * keys < s_kv <= splits * keys  # none is empty
        assert keys % tile.cols == 0
        if s_kv >= 75_000:
            assert splits * -(-rows // tile.rows) * 8 >= processors
