"""Whatever the shapes, cuts, masks, dtypes and number of ranks: what must hold of the reference."""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from lvxattn import mpi_impl, reference
from lvxattn.reference import Layout, Message, Meter, VirtualComm, run_ranks
from tests.backends import MPI_NUMPY
from tests.cases import MASKS, Case, Problem
from tests.judge import solve, worst_ratios
from tests.test_block_attention import solve_block

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Cut(Case):
    """A case that is cut at any given places."""

    q_bounds: tuple[int, ...] = ()
    kv_bounds: tuple[int, ...] = ()

    def cuts(self, P: int) -> tuple[list[int], list[int]]:
        return list(self.q_bounds), list(self.kv_bounds)

    @property
    def P(self) -> int:
        return len(self.q_bounds) - 1


@st.composite
def cuts(draw: Any) -> Cut:
    P = draw(st.sampled_from([1, 2, 3, 4, 5, 7]))
    S_Q, S_KV = draw(st.integers(0, 17)), draw(st.integers(0, 23))
    H_KV = draw(st.integers(1, 3))

    def bounds(length: int) -> tuple[int, ...]:
        inner = draw(st.lists(st.integers(0, length), min_size=P - 1, max_size=P - 1))
        return (0, *sorted(inner), length)

    return Cut(
        "drawn",
        B=draw(st.integers(1, 2)),
        H=H_KV * draw(st.integers(1, 3)),
        H_KV=H_KV,
        S_Q=S_Q,
        S_KV=S_KV,
        D=draw(st.integers(1, 5)),
        D_V=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float64", "float32", "float16", "bfloat16"])),
        mask=draw(st.sampled_from(sorted(MASKS))),
        score=draw(st.sampled_from([1.0, 30.0])),
        seed=draw(st.integers(0, 1000)),
        q_bounds=bounds(S_Q),
        kv_bounds=bounds(S_KV),
    )


def frozen(problem: Problem) -> Problem:
    """Return the problem with arrays that raise when they are written to."""
    for field in fields(problem):
        x = getattr(problem, field.name)
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    return problem


def solve_on_ranks(problem: Problem, P: int, **options: Any) -> list[dict[str, Any]]:
    return run_ranks(P, lambda comm: solve(problem, comm, reference, **options))


@settings(max_examples=250)
@given(case=cuts(), reuse_layout=st.booleans())
def test_ranks_equal_naive_results_and_leave_inputs_unchanged(
    case: Cut, reuse_layout: bool
) -> None:
    problem = frozen(case.make())
    results = solve_on_ranks(problem, case.P, reuse_layout=reuse_layout)
    truth = problem.truth()
    for result in results:
        assert max(worst_ratios(problem, result, truth, fp64=True).values()) <= 1


@settings(max_examples=150)
@given(case=cuts(), parts=st.integers(1, 4))
def test_mpi_blocks_equal_naive_results(case: Cut, parts: int) -> None:
    problem = frozen(case.make())
    results = solve_block(problem, MPI_NUMPY, parts)
    assert max(worst_ratios(problem, results).values()) <= 1


@settings(max_examples=40)
@given(case=cuts())
def test_the_same_ranks_give_the_same_bits(case: Cut) -> None:
    problem = case.make()
    first, again = (solve_on_ranks(problem, case.P) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert all(a[name].tobytes() == b[name].tobytes() for name in NAMES)


@settings(max_examples=40)
@given(case=cuts())
def test_wide_wire_dtype(case: Cut) -> None:
    problem = case.make()
    plain = solve_on_ranks(problem, case.P)[0]
    wide = run_ranks(case.P, lambda comm: solve(problem, comm, reference), wire_dtype=np.float64)[0]
    assert all(np.array_equal(plain[name], wide[name]) for name in NAMES)


def every_other(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the same numbers, every other element of a larger array."""
    larger = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    larger[..., ::2] = x
    return larger[..., ::2]


def head_last(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the same numbers, laid out (B, S, H, D) in memory."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def backwards(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the same numbers, with negative strides in memory."""
    return x[..., ::-1, ::-1].copy()[..., ::-1, ::-1]


def read_only(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = x.copy()
    x.flags.writeable = False
    return x


def call(implementation: Any, comm: Any, arrays: dict[str, Any], mask: Any) -> list[Any]:
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    out, lse = implementation.cross_attention(q, k, v, comm, mask=mask)
    grads = implementation.cross_attention_backward(dout, q, k, v, out, lse, comm, mask=mask)
    return [out, lse, *grads]


def on_one_rank(implementation: Any, arrays: dict[str, Any], mask: Any) -> list[Any]:
    if implementation is reference:
        return run_ranks(1, lambda comm: call(reference, comm, arrays, mask))[0]
    return call(mpi_impl, MPI.COMM_SELF, arrays, mask)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [reference, mpi_impl], ids=["reference", "mpi"]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", [every_other, head_last, backwards, read_only])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_memory_layout_does_not_matter(dtype: str, layout: Any, implementation: Any) -> None:
    p = Case("memory", B=2, H=4, H_KV=2, mask="full", dtype=dtype).make()
    arrays = {"q": p.q, "k": p.k, "v": p.v, "dout": p.dout}
    strange = {name: layout(x) for name, x in arrays.items()}
    before = {name: x.copy() for name, x in strange.items()}
    results = on_one_rank(implementation, strange, layout(p.mask))
    problem = Problem(p.case, p.q, p.k, p.v, p.dout, np.zeros_like(p.dlse), p.scale, p.mask)
    ratios = worst_ratios(
        problem, dict(zip(NAMES, results, strict=True)), fp64=implementation is reference
    )
    assert max(ratios.values()) <= 1
    assert all(np.array_equal(strange[name], before[name]) for name in arrays)


@IMPLEMENTATIONS
def test_zero_stride_inputs(implementation: Any) -> None:
    p = Case("stride 0", B=2, H=2, S_Q=5, S_KV=9).make()
    arrays = {"q": p.q, "k": p.k, "v": p.v, "dout": p.dout}
    stretched = {name: np.broadcast_to(x[:1, :, :1], x.shape) for name, x in arrays.items()}
    assert all(x.strides[0] == x.strides[2] == 0 for x in stretched.values())
    copies = {name: x.copy() for name, x in stretched.items()}
    problem = Problem(
        p.case, copies["q"], copies["k"], copies["v"], copies["dout"], np.zeros_like(p.dlse),
        p.scale, None,
    )  # fmt: skip
    results = on_one_rank(implementation, stretched, None)
    ratios = worst_ratios(
        problem, dict(zip(NAMES, results, strict=True)), fp64=implementation is reference
    )
    assert max(ratios.values()) <= 1


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float16")])
def test_dtype_may_change_between_calls(dtypes: tuple[str, str], implementation: Any) -> None:
    for dtype in (*dtypes, dtypes[0]):
        p = Case("dtypes", dtype=dtype).make()
        results = on_one_rank(implementation, {"q": p.q, "k": p.k, "v": p.v, "dout": p.dout}, None)
        problem = Problem(p.case, p.q, p.k, p.v, p.dout, np.zeros_like(p.dlse), p.scale, None)
        ratios = worst_ratios(
            problem, dict(zip(NAMES, results, strict=True)), fp64=implementation is reference
        )
        assert max(ratios.values()) <= 1
        if implementation is mpi_impl:
            assert [str(x.dtype) for x in results if x.ndim == 4] == [dtype] * 4


@pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("cyclic", [False, True])
def test_each_block_is_sent_P_minus_1_times(P: int, cyclic: bool) -> None:
    p = Case("bytes", B=2, H=6, H_KV=2, S_Q=29, S_KV=31, D=4, D_V=3, cut="ragged").make()
    bounds, _ = p.case.cuts(P)
    s_q = [b - a for a, b in pairwise(bounds)]
    forward: list[Message] = []
    both: list[Message] = []

    def attend(comm: VirtualComm, backward: bool) -> tuple[Meter, Meter, tuple[int, ...]]:
        part = p.part(comm.rank, P)
        meters = Meter(), Meter()
        given = part["q"], part["k"], part["v"]
        out, lse = reference.cross_attention(*given, comm, meter=meters[0])
        if backward:
            reference.cross_attention_backward(
                part["dout"], *given, out, lse, comm, meter=meters[1]
            )
        return *meters, Layout.agree(*given, comm).order

    hosts = ["ab"[r % 2] if cyclic else "a" for r in range(P)]
    run_ranks(P, attend, False, hosts=hosts, log=forward)
    results = run_ranks(P, attend, True, hosts=hosts, log=both)
    for log, widths, kind in (
        (forward, (p.case.D, p.case.D_V + 2), 0),
        (both, (p.case.D + p.case.D_V + 2, p.case.D), 1),
    ):
        if kind == 1:
            assert len(log) == 4 * P * (P - 1)
            log = [m for r in range(P) for m in [m for m in log if m.source == r][2 * (P - 1) :]]
        assert len(log) == 2 * P * (P - 1)
        order = results[0][2]
        for rank in range(P):
            # A rank sends on its own block and those that it gets, but not the last one; and the
            # results of all blocks but its own.
            place = order.index(rank)
            rows = [s_q[order[(place - hop) % P]] for hop in range(P)]
            want = 8 * 2 * 6 * (widths[0] * sum(rows[: P - 1]) + widths[1] * sum(rows[1:]))
            sent = [m for m in log if m.source == rank]
            meter = results[rank][kind]
            assert len(sent) == meter.messages == 2 * (P - 1)
            assert sum(m.nbytes for m in sent) == meter.bytes == want
            assert {m.dest for m in sent} <= {order[(place + 1) % P]}


def test_meter_accumulates_over_calls() -> None:
    p = Case("meter").make()

    def fn(comm: VirtualComm) -> Meter:
        part, meter = p.part(comm.rank, 3), Meter()
        for _ in range(2):
            reference.cross_attention(part["q"], part["k"], part["v"], comm, meter=meter)
        return meter

    for meter in run_ranks(3, fn):
        assert meter.messages == 2 * 4
        assert meter.computing > 0
        assert meter.waiting > 0
