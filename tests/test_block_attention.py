"""One block against one rank's keys, in every implementation and kind of array."""

import sys
import tracemalloc
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from torch.profiler import profile

from lvxattn.common.masks import MaskView
from tests.backends import (
    BLOCK_BACKENDS,
    MPI_DEVICE,
    MPI_NUMPY,
    REFERENCE,
    TORCH,
    TORCH_AUTO,
    TORCH_BLOCKED,
    TORCH_FLASH,
    TORCH_SPLIT,
    Backend,
    host,
)
from tests.cases import BF16, CASES, Case, Problem
from tests.judge import ratio, worst_ratios
from tests.naive import naive_attention
from tests.tolerances import limits

TILED = [
    Case("grouped", B=2, H=4, H_KV=2, D_V=5),
    *(
        Case(f"mask {m}", B=2, H=6, H_KV=2, mask=m, dtype="float32")
        for m in ("full", "additive", "callable", "padding", "dead rows", "over heads")
    ),
]
TILES = [(1, 1), (5, 7), (31, 32), (8, 97)]  # rows and keys
backends = pytest.mark.parametrize("backend", BLOCK_BACKENDS, ids=lambda backend: backend.name)
takes_any_mask = pytest.mark.parametrize(
    "backend",
    [b for b in BLOCK_BACKENDS if b not in (TORCH_FLASH, TORCH_SPLIT)],
    ids=lambda backend: backend.name,
)


def solvable(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrise over cases and the backends that solve them, in one part or, by turns, in three.

    The other number is slow.
    """
    found = [
        pytest.param(
            case, backend, parts, id=f"{case.name}-{backend.name}-{parts}",
            marks=[] if (n + m + parts // 2) % 2 else pytest.mark.slow,
        )
        for n, case in enumerate(cases)
        for m, backend in enumerate(BLOCK_BACKENDS)
        if backend.can(case)
        for parts in (1, 3)
    ]  # fmt: skip
    return pytest.mark.parametrize(("case", "backend", "parts"), found)


@pytest.fixture(autouse=True)
def few_keys_are_split_too(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lvxattn.torch_impl.kernels.split"]
    monkeypatch.setattr(module, "parts_for", lambda job: min(3, job.s_kv))


def solve_block(problem: Problem, backend: Backend, parts: int = 1, **options: Any) -> Any:
    """Return all results of a problem whose keys are taken in some parts and merged."""
    attend, merge = backend.implementation.block_attention, backend.implementation.merge
    backward = backend.backward
    q, k, v, dout = (backend.array(x) for x in (problem.q, problem.k, problem.v, problem.dout))
    wide = backend.wide(problem.q.dtype)
    dout_wide, dlse = (backend.array(x.astype(wide)) for x in (problem.dout, problem.dlse))
    home, S_KV = MaskView.of(backend.array(problem.mask)), problem.k.shape[2]
    options |= {"scale": problem.scale, **backend.options}

    def full(shape: tuple[int, ...], value: float = 0.0) -> Any:
        return backend.array(np.full(shape, value, wide))

    keys = [slice(S_KV * i // parts, S_KV * (i + 1) // parts) for i in range(parts)]
    out, lse = full(problem.dout.shape), full(problem.dlse.shape, -np.inf)
    for at in keys:
        view = home.from_key(at.start)
        out, lse = merge(out, lse, *attend(q, k[:, :, at], v[:, :, at], mask=view, **options))
    delta = (dout_wide * out).sum(axis=-1) - dlse
    dk, dv, dq = full(k.shape), full(v.shape), full(q.shape)
    for at in keys:
        dq += backward(
            dout, q, k[:, :, at], v[:, :, at], lse, delta, dk[:, :, at], dv[:, :, at],
            mask=home.from_key(at.start), **options,
        )  # fmt: skip
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    results = {name: host(x) for name, x in results.items()}
    assert {x.dtype for x in results.values()} == {wide}
    return results


def small_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, keys: int) -> None:
    """Make every implementation cut blocks into tiles of at most that many rows and keys."""
    module = sys.modules["lvxattn.reference.block_attention"]
    monkeypatch.setattr(module, "_tile_keys", lambda lines: keys)
    for name in ("mpi_impl.block_attention", "torch_impl.kernels.blocked"):
        module = sys.modules[f"lvxattn.{name}"]

        class SmallTiles(module.Tiles):  # type: ignore[name-defined, misc]
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.tile_rows = min(rows, self.tile_rows)
                self.tile_keys = min(keys, self.tile_keys)

        monkeypatch.setattr(module, "Tiles", SmallTiles)


@solvable(CASES + BF16)
def test_equals_naive_softmax_and_its_gradients(case: Case, backend: Backend, parts: int) -> None:
    problem = case.make()
    results = solve_block(problem, backend, parts)
    assert max(worst_ratios(problem, results, fp64=backend.fp64).values()) <= 1


@pytest.mark.parametrize(
    ("case", "rows", "keys", "backend"),
    [
        pytest.param(
            case, *tile, backend, id=f"{case.name}-{tile}-{backend.name}",
            marks=[] if (i + j + k) % len(TILES) == 0 else pytest.mark.slow,
        )
        for i, case in enumerate(TILED)
        for j, tile in enumerate(TILES)
        for k, backend in enumerate((REFERENCE, MPI_NUMPY, MPI_DEVICE, TORCH_BLOCKED))
    ],
)  # fmt: skip
def test_tile_size_does_not_change_results(
    case: Case, rows: int, keys: int, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if keys == 1:
        case = replace(case, S_Q=7, S_KV=11)  # the same, in less time
    small_tiles(monkeypatch, rows, keys)
    problem = case.make()
    results = solve_block(problem, backend, parts=2)
    assert max(worst_ratios(problem, results, fp64=backend.fp64).values()) <= 1


@pytest.mark.parametrize(
    "backend", [MPI_NUMPY, MPI_DEVICE, TORCH_BLOCKED, TORCH_AUTO], ids=lambda backend: backend.name
)
@pytest.mark.parametrize("lengths", [(2049, 3), (3, 1100), (600, 1500)], ids=str)
def test_blocks_longer_than_a_tile(lengths: tuple[int, int], backend: Backend) -> None:
    S_Q, S_KV = lengths
    problem = Case("long", H=4, S_Q=S_Q, S_KV=S_KV, dtype="float32", mask="over heads").make()
    results = solve_block(problem, backend)
    assert max(worst_ratios(problem, results).values()) <= 1


@takes_any_mask
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_backward_accumulates_gradients(dtype: str, backend: Backend) -> None:
    problem = Case("adds", B=2, H=4, H_KV=2, dtype=dtype, mask="full").make()
    wide = backend.wide(problem.q.dtype)
    q, k, v, dout = (backend.array(x) for x in (problem.q, problem.k, problem.v, problem.dout))
    rng = np.random.default_rng(0)
    lse, delta = (backend.array(rng.standard_normal(q.shape[:3]).astype(wide)) for _ in range(2))
    before = [rng.standard_normal(x.shape).astype(wide) for x in (k, v)]
    mask = backend.array(problem.mask)
    options = {"scale": problem.scale, "mask": mask, **backend.options}
    backward = backend.backward
    shares = [backend.array(np.zeros(x.shape, wide)) for x in (k, v)]
    dq = backward(dout, q, k, v, lse, delta, *shares, **options)
    there = [backend.array(x.copy()) for x in before]
    again = backward(dout, q, k, v, lse, delta, *there, **options)
    assert np.array_equal(host(dq), host(again))
    for x, share, total in zip(before, shares, there, strict=True):
        # One tile, and so one addition.
        assert np.array_equal(host(total), x + host(share))
        assert host(share).any()


@pytest.mark.parametrize("backend", [MPI_NUMPY, MPI_DEVICE], ids=lambda backend: backend.name)
def test_progress_is_called_after_every_tile(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch, rows=10, keys=25)
    problem = Case("progress", B=2, H=4, H_KV=2).make()
    calls: list[int] = []
    heads = 2 if backend is MPI_NUMPY else 1  # NumPy takes one key-value head at a time
    solve_block(problem, backend, progress=lambda: calls.append(len(calls)))
    assert len(calls) == 2 * (2 * heads * 4 * 4)  # both ways: batches, heads, 31 rows, 97 keys


@takes_any_mask
@pytest.mark.parametrize("from_key", [0, 9])
@pytest.mark.parametrize("mask", ["full", "over queries", "two axes", "additive", "callable"])
def test_views_select_the_block_of_the_mask(mask: str, from_key: int, backend: Backend) -> None:
    whole = Case("views", B=2, H=4, H_KV=2, mask=mask).make()
    rows, keys, first = slice(11, 24), slice(30, 60), 30 + from_key
    indices = np.ix_(*(np.arange(n) for n in (2, 4, 31, 97)))
    seen = whole.mask(*indices) if callable(whole.mask) else whole.mask
    seen = np.broadcast_to(seen, (2, 4, 31, 97))[:, :, rows, first:60]
    held = whole.mask if callable(whole.mask) else whole.mask[..., keys]
    view = MaskView(backend.array(held), q_start=11, kv_start=30).from_key(from_key)
    q, k, v = whole.q[:, :, rows], whole.k[:, :, first:60], whole.v[:, :, first:60]
    dout, dlse = whole.dout[:, :, rows], whole.dlse[:, :, rows]
    truth = naive_attention(q, k, v, whole.scale, seen, dout, dlse)
    out, lse = backend.implementation.block_attention(
        *(backend.array(x) for x in (q, k, v)), scale=whole.scale, mask=view, **backend.options
    )
    limit = limits(whole.case, truth, "float64", "float64")
    assert ratio(host(out), truth.results["out"], limit["out"]) <= 1
    assert ratio(host(lse), truth.results["lse"], limit["lse"]) <= 1


@takes_any_mask
def test_arguments_are_only_read(backend: Backend) -> None:
    problem = Case("read", B=2, H=4, H_KV=2, dtype="float32", mask="additive").make()
    given = [backend.array(x) for x in (problem.q, problem.k, problem.v, problem.mask)]
    before = [host(x).copy() for x in given]
    if backend is not MPI_DEVICE and backend not in TORCH:
        for x in given:
            x.flags.writeable = False
    q, k, v, mask = given
    backend.implementation.block_attention(q, k, v, scale=1.0, mask=mask, **backend.options)
    assert all(np.array_equal(host(x), y) for x, y in zip(given, before, strict=True))


@backends
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_dead_rows_get_no_gradient(bad: float, backend: Backend) -> None:
    problem = Case("dead", B=2, H=4, H_KV=2, mask="dead rows", dtype="float32").make()
    dead = ~problem.mask.any(axis=-1)
    lse = np.where(dead, -np.inf, 1.0).astype(backend.wide("float32"))
    dout = np.where(dead[..., None], np.float32(bad), problem.dout)
    dlse = np.where(dead, bad, problem.dlse).astype(lse.dtype)
    out = np.where(dead[..., None], 0.0, problem.dout).astype(lse.dtype)
    delta_of = sys.modules[f"{backend.implementation.__name__}.block_attention"].delta_of
    *given, lse_remainder, dlse = (
        backend.array(x) for x in (dout, out, lse, 0.0 * lse.clip(0), dlse)
    )
    dout, delta = (host(x) for x in delta_of(*given, lse_remainder, dlse))
    assert not dout[dead].any()
    assert not delta[dead].any()
    assert np.array_equal(dout[~dead], problem.dout[~dead])
    want = (problem.dout[~dead].astype(np.float64) ** 2).sum(axis=-1) - problem.dlse[~dead]
    assert np.allclose(delta[~dead], want, rtol=0, atol=100 * 2.0**-24)


def test_reference_computes_grouped_heads_together() -> None:
    problem = Case("one key-value head", H=6, H_KV=1).make()
    grouped = solve_block(problem, REFERENCE)
    repeated = replace(
        problem, k=np.repeat(problem.k, 6, axis=1), v=np.repeat(problem.v, 6, axis=1)
    )
    assert grouped["dk"].shape[1] == 1
    limit = limits(problem.case, problem.truth(), "float64", "float64")
    assert ratio(solve_block(repeated, REFERENCE)["out"], grouped["out"], 2 * limit["out"]) <= 1


@pytest.mark.parametrize("backend", [MPI_NUMPY, TORCH_BLOCKED], ids=lambda backend: backend.name)
def test_few_queries_copy_keys_of_half_precision_by_tiles(backend: Backend) -> None:
    """With one query a tile of scores has room for all keys, and their copies would be as long."""
    k = np.ones((1, 1, 2**17, 64), np.float16)
    q, keys = backend.array(k[:, :, :1]), backend.array(k)
    attend = partial(backend.implementation.block_attention, q, keys, keys, scale=0.1)
    if backend is TORCH_BLOCKED:
        with profile(profile_memory=True) as seen:
            attend(**backend.options)
        peak = max(e.cpu_memory_usage for e in seen.events())
    else:
        tracemalloc.start()
        attend(**backend.options)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < k.nbytes / 3
