"""Every defect that existing implementations are known for, and the proof that ours lacks it."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from lvxattn import mpi_impl, reference
from lvxattn.reference import Message, VirtualComm, run_ranks
from lvxattn.reference.recompute import project, project_backward
from tests.backends import BACKENDS, MPI_DEVICE, MPI_NUMPY, Backend, host
from tests.cases import Case, Problem
from tests.judge import ratio, solve, worst_ratios
from tests.test_block_attention import solve_block
from tests.tolerances import UNIT, limits, merged, summed

backends = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
mpi_backends = pytest.mark.parametrize(
    "backend", [MPI_NUMPY, MPI_DEVICE], ids=lambda backend: backend.name
)
RANKS = pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 7])


def on_ranks(problem: Problem, P: int) -> list[dict[str, Any]]:
    return run_ranks(P, lambda comm: solve(problem, comm, reference))


def right(problem: Problem, results: dict[str, Any], backend: Backend | None = None) -> bool:
    fp64 = backend is None or backend.fp64
    return max(worst_ratios(problem, results, fp64=fp64).values()) <= 1


def near(lse: float, **options: Any) -> Problem:
    """Return a problem with lse near the given value: equal keys, so that only the level counts."""
    p = Case("level", S_Q=6, S_KV=8, **options).make()
    q = np.zeros_like(p.q)
    q[..., 0] = 1
    k = np.zeros_like(p.k)
    k[..., 0] = (lse - np.log(8)) / p.scale
    return replace(p, q=q, k=k)


class TestPhantomKey:
    """An accumulator that starts with lse = 0 counts a key that is not there."""

    LEVELS = pytest.mark.parametrize("lse", [-4.0, 0.0, 4.0])

    @LEVELS
    @RANKS
    def test_on_ranks(self, lse: float, P: int) -> None:
        problem = near(lse)
        assert all(right(problem, results) for results in on_ranks(problem, P))

    @LEVELS
    @backends
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_in_blocks(self, lse: float, dtype: str, backend: Backend) -> None:
        problem = near(lse, dtype=dtype)
        assert right(problem, solve_block(problem, backend, parts=4), backend)


@pytest.mark.parametrize("P", [2, 3, 4, 5, 7, 9])
def test_no_rank_returns_its_neighbours_output(P: int) -> None:
    p = Case("neighbour", S_Q=P, S_KV=2 * P).make()

    def fn(comm: VirtualComm) -> Any:
        part = p.part(comm.rank, P)
        out, lse = reference.cross_attention(part["q"], part["k"], part["v"], comm)
        return out, lse

    truth = p.truth()
    limit = limits(p.case, truth, "float64", "float64")
    for rank, (out, lse) in enumerate(run_ranks(P, fn)):
        mine = np.s_[:, :, rank : rank + 1]
        assert ratio(out, truth.results["out"][mine], limit["out"][mine]) <= 1
        assert ratio(lse, truth.results["lse"][mine], limit["lse"][mine]) <= 1


class TestMergeOverflow:
    """log(exp + exp) without the maximum overflows past lse 88 in fp32."""

    LEVELS = pytest.mark.parametrize("lse", [-750.0, -90.0, 88.0, 89.0, 1000.0])

    @LEVELS
    @pytest.mark.parametrize("P", [2, 3, 5])
    def test_on_ranks(self, lse: float, P: int) -> None:
        problem = near(lse)
        assert all(right(problem, results) for results in on_ranks(problem, P))

    @LEVELS
    @backends
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_in_blocks(self, lse: float, dtype: str, backend: Backend) -> None:
        problem = near(lse, dtype=dtype)
        assert right(problem, solve_block(problem, backend, parts=4), backend)


class TestBiasOfBatchZero:
    """A bias broadcast over heads must be every batch entry's own."""

    CASES = pytest.mark.parametrize(
        "case",
        [
            Case("bias", B=3, mask="additive", H=4, H_KV=2),
            Case("mask", B=3, mask="over heads", H=4, H_KV=2),
            Case("padding", B=3, mask="padding", seed=1),
        ],
        ids=lambda case: case.name,
    )

    @CASES
    @RANKS
    def test_on_ranks(self, case: Case, P: int) -> None:
        problem = case.make()
        assert not np.array_equal(problem.mask[0], problem.mask[1])
        assert all(right(problem, results) for results in on_ranks(problem, P))

    @CASES
    @backends
    def test_in_blocks(self, case: Case, backend: Backend) -> None:
        problem = case.make()
        assert right(problem, solve_block(problem, backend, parts=2), backend)


class TestLengthsThatAreNoMultiples:
    """Lengths need be multiples neither of 32 nor of the number of ranks, and nothing is padded."""

    LENGTHS = pytest.mark.parametrize(("S_Q", "S_KV"), [(1, 33), (33, 1), (31, 65), (65, 127)])

    @LENGTHS
    @RANKS
    def test_on_ranks(self, S_Q: int, S_KV: int, P: int) -> None:
        problem = Case("lengths", S_Q=S_Q, S_KV=S_KV).make()
        assert all(right(problem, results) for results in on_ranks(problem, P))

    @LENGTHS
    @backends
    def test_in_blocks(self, S_Q: int, S_KV: int, backend: Backend) -> None:
        problem = Case("lengths", S_Q=S_Q, S_KV=S_KV, dtype="float32").make()
        assert right(problem, solve_block(problem, backend, parts=3), backend)


class TestNaNOnFullyMaskedRows:
    """A row that may attend to nothing gives (0, -inf), and no gradient."""

    MASKED = pytest.mark.parametrize("mask", ["dead rows", "all dead", "dead shard"])

    @staticmethod
    def check(problem: Problem, results: dict[str, Any]) -> None:
        dead = problem.truth().results["lse"] == -np.inf
        assert dead.any() == (problem.case.mask != "dead shard")
        assert (results["lse"][dead] == -np.inf).all()
        assert not results["out"][dead].any()
        assert not results["dq"][dead].any()
        assert all(np.isfinite(results[name]).all() for name in ("out", "dq", "dk", "dv"))

    @MASKED
    @RANKS
    def test_on_ranks(self, mask: str, P: int) -> None:
        problem = Case("dead", B=2, mask=mask).make()
        for results in on_ranks(problem, P):
            self.check(problem, results)

    @MASKED
    @backends
    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
    def test_in_blocks(self, mask: str, dtype: str, backend: Backend) -> None:
        problem = Case("dead", B=2, mask=mask, dtype=dtype).make()
        self.check(problem, solve_block(problem, backend, parts=3))

    @backends
    def test_merging_two_dead_rows(self, backend: Backend) -> None:
        nothing = [backend.array(x) for x in (np.zeros((3, 2)), np.full(3, -np.inf))]
        out, lse = backend.implementation.merge(*nothing, *nothing)
        assert not host(out).any()
        assert (host(lse) == -np.inf).all()

    @backends
    def test_additive_masks(self, backend: Backend) -> None:
        problem = Case("additive", mask="additive").make()
        problem.mask[:, :, ::2] = -np.inf
        results = solve_block(problem, backend, parts=3)
        self.check(problem, results)
        assert right(problem, results, backend)


@mpi_backends
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_all_dtypes_are_supported(dtype: str, backend: Backend) -> None:
    p = Case("dtype", dtype=dtype).make()
    q, k, v, dout = (backend.array(x) for x in (p.q, p.k, p.v, p.dout))
    out, lse = mpi_impl.cross_attention(q, k, v, MPI.COMM_SELF)
    dlse = backend.array(p.dlse.astype(lse.dtype))
    grads = mpi_impl.cross_attention_backward(dout, q, k, v, out, lse, MPI.COMM_SELF, dlse=dlse)
    assert {x.dtype for x in (out, *grads)} == {p.q.dtype}
    assert lse.dtype == ("float64" if dtype == "float64" else "float32")
    results = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    assert right(p, {name: host(x) for name, x in results.items()}, backend)


@mpi_backends
def test_no_buffer_is_stale_after_a_change_of_dtype(backend: Backend) -> None:
    for dtype in ("float32", "float64", "float16", "float32"):
        problem = Case("stale", dtype=dtype).make()  # other numbers, same shapes
        problem = replace(problem, q=problem.q * (2 if dtype == "float64" else 1))
        assert right(problem, solve_block(problem, backend, parts=2), backend)


def test_no_module_keeps_arrays() -> None:
    def kept() -> dict[tuple[str, str], int]:
        """How much every container and array of a module holds."""
        return {
            (module, name): x.size if isinstance(x, np.ndarray) else len(x)
            for module in list(sys.modules)
            if module.startswith("lvxattn.")
            for name, x in vars(sys.modules[module]).items()
            if isinstance(x, np.ndarray | dict | list | set) and not name.startswith("__")
        }

    before = kept()
    problem = Case("state").make()
    on_ranks(problem, 3)
    solve_block(problem, MPI_NUMPY)
    assert before
    assert kept() == before


@pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 7])
def test_queries_and_results_make_p_minus_1_hops(P: int) -> None:
    log: list[Message] = []
    problem = Case("hops", S_Q=4 * P, S_KV=8 * P).make()

    def forward(comm: VirtualComm) -> None:
        part = problem.part(comm.rank, P)
        reference.cross_attention(part["q"], part["k"], part["v"], comm)

    run_ranks(P, forward, log=log)
    assert [sum(m.tag == tag for m in log) for tag in (7001, 7002)] == [P * (P - 1)] * 2
    assert len(log) == 2 * P * (P - 1)


@pytest.mark.parametrize("P", [2, 3, 5])
def test_backward_does_not_send_the_output(P: int) -> None:
    log: list[Message] = []
    p = Case("wide", S_Q=P, S_KV=P, D=1, D_V=64).make()  # out would be most of what is sent
    run_ranks(P, lambda comm: solve(p, comm, reference), log=log)
    queries, results = 1, 64 + 2
    blocks, gradients = 1 + 64 + 2, 1
    rows = 8 * p.case.H
    want = P * (P - 1) * rows * (queries + results + blocks + gradients)
    assert sum(m.nbytes for m in log) == want


@pytest.mark.parametrize("reach", ["forward", "backward"])
@mpi_backends
def test_error_does_not_grow_with_key_shards(backend: Backend, reach: str) -> None:
    p = Case("shards", S_Q=16, S_KV=512, dtype="float32").make()
    truth = p.truth()
    limit = limits(p.case, truth, "float32", "float32")
    names = ("out", "lse") if reach == "forward" else ("dq", "dk", "dv")
    for P in (1, 2, 4, 8, 16, 32, 64):
        results = solve_block(p, backend, parts=P)
        assert max(ratio(results[n], truth.results[n], limit[n]) for n in names) <= 1


@pytest.mark.parametrize("P", [2, 8, 32, pytest.param(64, marks=pytest.mark.slow)])
def test_fp32_wire_error_does_not_grow_with_ranks(P: int) -> None:
    p = Case("ranks", H=1, H_KV=1, S_Q=64, S_KV=128).make()
    truth = p.truth()
    results = run_ranks(P, lambda comm: solve(p, comm, reference), wire_dtype="float32")[0]
    limit = limits(p.case, truth, "float32", "float32")
    assert max(ratio(results[n], truth.results[n], limit[n]) for n in limit) <= 1


@pytest.mark.parametrize("P", [2, 3, 5])
def test_heads_of_a_group_are_never_repeated_on_the_wire(P: int) -> None:
    def sent(H_KV: int) -> list[int]:
        log: list[Message] = []
        problem = Case("groups", H=8, H_KV=H_KV, S_Q=5, S_KV=1000, cut="ragged").make()
        run_ranks(P, lambda comm: solve(problem, comm, reference), log=log)
        return [m.nbytes for m in log if m.tag in (7001, 7002)]

    # Keys and values stay: their heads and their number do not show on the wire at all.
    rows = 8 * 8 * (8 + 8 + 2 + 8 + 8 + 2 + 8)  # bytes, heads, widths of q, out, lse and so on
    assert sum(sent(8)) == sum(sent(1)) == (P - 1) * 5 * rows


@backends
def test_heads_of_a_group_are_never_repeated_in_memory(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("keys were repeated")

    monkeypatch.setattr(np, "repeat", refuse)
    monkeypatch.setattr(np, "tile", refuse)
    p = Case("groups", H=8, H_KV=1).make()
    results = solve_block(p, backend)
    assert results["dk"].shape == p.k.shape
    assert results["dv"].shape == p.v.shape


@pytest.mark.parametrize("P", [1, 3])
def test_recomputation_returns_gradients_of_features_and_projections(P: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1, 6, 4)), rng.standard_normal((1, 9, 5))
    weights = [rng.standard_normal(s) for s in ((4, 2, 3), (5, 2, 3), (5, 2, 3))]
    dout = rng.standard_normal((1, 2, 6, 3))

    def fn(comm: VirtualComm) -> Any:
        part = [reference.shard(a, comm, axis=1) for a in (x, y)]
        w_q, w_k, w_v = weights

        def make_kv(y: Any) -> Any:
            return project(y, w_k), project(y, w_v)

        q = project(part[0], w_q)
        _, saved = reference.cross_attention_layer(q, part[1], make_kv, comm)
        rows = reference.shard(dout, comm)
        dq, dk, dv = reference.cross_attention_layer_backward(rows, saved, make_kv, comm)
        dx, dw_q = project_backward(dq, part[0], w_q)
        dy_k, dw_k = project_backward(dk, part[1], w_k)
        dy_v, dw_v = project_backward(dv, part[1], w_v)
        return dx, dy_k + dy_v, dw_q, dw_k, dw_v

    for grads in run_ranks(P, fn):
        for gradient, argument in zip(grads[2:], weights, strict=True):
            assert gradient.shape == argument.shape
        assert grads[0].shape == (1, 6 // P, 4)
        assert grads[1].shape == (1, 9 // P, 5)
        assert all(g.any() for g in grads)


@RANKS
def test_attention_reaches_the_keys_of_all_ranks(P: int) -> None:
    # One key in each shard in turn draws all attention; a rank that stays local never finds it.
    def fn(comm: VirtualComm, target: int) -> Any:
        q, k = np.full((1, 1, 1, 1), 50.0), np.zeros((1, 1, 2, 1))
        k[0, 0, 1] = comm.rank == target
        v = np.full((1, 1, 2, 1), float(comm.rank))
        return float(reference.cross_attention(q, k, v, comm, scale=1.0)[0][0, 0, 0, 0])

    for target in range(P):
        # The others' weights are exp(-50) each, 2e-22: below a unit of the last place of fp64.
        off = summed(UNIT["float64"], 2 * P) * max(1, target)
        assert all(abs(found - target) <= off for found in run_ranks(P, fn, target))


@pytest.mark.parametrize("P", [1, 2, 3])
def test_backward_uses_the_keys_it_is_given(P: int) -> None:
    p, other = (Case("keys", S_Q=6, S_KV=9, seed=s).make() for s in (0, 1))
    assert not np.array_equal(p.k, other.k)

    def fn(comm: VirtualComm) -> Any:
        options: dict[str, Any] = {"scale": p.scale}
        first, second = p.part(comm.rank, P), other.part(comm.rank, P)
        given = [part[name] for part in (first, second) for name in ("q", "k", "v")]
        layout = reference.Layout.agree(*given[:3], comm, **options)
        saved = reference.cross_attention(*given[:3], comm, layout=layout)
        other_saved = reference.cross_attention(*given[3:], comm, layout=layout)
        return [
            [
                reference.unshard(x, comm)
                for x in reference.cross_attention_backward(
                    part["dout"], *arrays, *kept, comm, layout=layout, dlse=part["dlse"]
                )
            ]
            for part, arrays, kept in (
                (first, given[:3], saved), (second, given[3:], other_saved),
            )
        ]  # fmt: skip

    for grads in run_ranks(P, fn):
        for problem, found in zip((p, other), grads, strict=True):
            assert right(problem, dict(zip(("dq", "dk", "dv"), found, strict=True)))


def test_half_precision_does_not_sum_in_half_precision() -> None:
    # 4096 keys of equal weight with values of 1: a sum in fp16 would stick at 2048.
    q, k, v = (
        np.zeros((1, 1, 1, 1), "f2"),
        np.zeros((1, 1, 4096, 1), "f2"),
        np.ones((1, 1, 4096, 1), "f2"),
    )
    for backend in (MPI_NUMPY, MPI_DEVICE):
        given = [backend.array(x) for x in (q, k, v)]
        out, lse = (host(x) for x in mpi_impl.block_attention(*given, scale=1.0))
        assert abs(float(out.item()) - 1) <= summed(UNIT["float32"], 4096)
        assert abs(float(lse.item()) - np.log(4096)) <= merged(UNIT["float32"], 4, np.log(4096))


@mpi_backends
def test_delta_is_not_taken_in_half_precision(backend: Backend) -> None:
    # rowsum(dout * out) is beyond 65,504, the largest number of fp16; the gradients are not.
    p = Case("delta", dtype="float16", offset=200.0, D_V=32).make()
    p = replace(p, dout=abs(p.dout) * np.float16(64), dlse=np.zeros_like(p.dlse))
    q, k, v, dout = (backend.array(x) for x in (p.q, p.k, p.v, p.dout))
    out, lse = mpi_impl.cross_attention(q, k, v, MPI.COMM_SELF)
    grads = mpi_impl.cross_attention_backward(dout, q, k, v, out, lse, MPI.COMM_SELF)
    assert (host(dout).astype("f4") * host(out)).sum(axis=-1).max() > 65_504
    assert right(p, dict(zip(("dq", "dk", "dv"), map(host, grads), strict=True)), backend)


class TestNaN:
    """NaN reaches what depends on it, and nothing else."""

    places = pytest.mark.parametrize("name", ["q", "k", "v"])

    @staticmethod
    def poisoned(name: str, **options: Any) -> tuple[Problem, Any]:
        """Return a problem with one NaN, and which rows it may reach."""
        p = Case("nan", B=2, H=4, H_KV=2, S_Q=12, S_KV=16, **options).make()
        reached = np.zeros((2, 4, 12), bool)
        if name == "q":
            p.q[1, 2, 5, 3] = np.nan
            reached[1, 2, 5] = True
        else:
            getattr(p, name)[0, 1, 9, 2] = np.nan
            reached[0, 2:4] = True  # the query heads of key-value head 1
        return p, reached

    def check(self, name: str, p: Problem, reached: Any, out: Any, lse: Any, clean: Any) -> None:
        assert np.array_equal(out[~reached], clean[0][~reached])
        assert np.array_equal(lse[~reached], clean[1][~reached])
        assert np.isnan(out[reached]).any()
        if name != "v":
            assert np.isnan(out[reached]).all()
            assert np.isnan(lse[reached]).all()

    @places
    @RANKS
    def test_on_ranks(self, name: str, P: int) -> None:
        p, reached = self.poisoned(name)
        clean = Case("nan", B=2, H=4, H_KV=2, S_Q=12, S_KV=16).make()

        def fn(comm: VirtualComm, problem: Problem) -> Any:
            part = problem.part(comm.rank, P)
            found = reference.cross_attention(part["q"], part["k"], part["v"], comm)
            return [reference.unshard(x, comm) for x in found]

        out, lse = run_ranks(P, fn, p)[0]
        self.check(name, p, reached, out, lse, run_ranks(P, fn, clean)[0])

    @places
    @backends
    def test_in_blocks(self, name: str, backend: Backend) -> None:
        p, reached = self.poisoned(name, dtype="float32")
        clean = Case("nan", B=2, H=4, H_KV=2, S_Q=12, S_KV=16, dtype="float32").make()

        def attend(problem: Problem) -> Any:
            given = (backend.array(x) for x in (problem.q, problem.k, problem.v))
            found = backend.implementation.block_attention(*given, scale=problem.scale)
            return [host(x) for x in found]

        self.check(name, p, reached, *attend(p), attend(clean))

    @places
    def test_in_the_truth(self, name: str) -> None:
        p, reached = self.poisoned(name)
        clean = Case("nan", B=2, H=4, H_KV=2, S_Q=12, S_KV=16).make()
        out, lse = reference.full_attention(p.q, p.k, p.v)
        self.check(name, p, reached, out, lse, reference.full_attention(clean.q, clean.k, clean.v))
