"""Distributed functions: correct ones pass on all kinds of ranks, wrong ones fail."""

import json
import sys
import time
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from lvxattn.check import (
    Report,
    Row,
    case_of,
    check,
    check_distributed,
    draw,
    suite_of,
)
from lvxattn.check.call_kernel import ContractError
from lvxattn.check.covering import covering
from lvxattn.check.frameworks import framework_of
from lvxattn.check.growth import GROWTH, LIMIT, judged_growth
from lvxattn.check.judge import RESULTS, Verdict
from lvxattn.check.ranks import RanksCaller, VirtualRanks
from lvxattn.check.ranks.tasks import (
    ElsewhereError,
    Outcome,
    UnsupportedElsewhereError,
    error_to_raise,
    joined,
)
from lvxattn.check.shards import CUTS, Cut, join_parts, sweep_of
from lvxattn.reference import cross_attention, cross_attention_backward
from tests.kernel_cache import cached_kernels  # noqa: F401
from tests.launch import PROGRAMS, Ended, mpiexec
from tests.planted_ranks import Planted
from tests.torch_ranks import forked

PROGRAM = PROGRAMS / "check_distributed.py"
FEW = ("gaussian", "random-mask", "ragged-lengths")
# At least one of each group.
SOME = (
    *("gaussian", "fewer-keys-than-shards", "dead-shard", "scores-600", "finite-minimum"),
    *("callable-mask", "padding-mask", "dead-rows", "hidden-rows", "grouped-heads", "value-size"),
    *("ragged-lengths", "stride-0", "one-hot-table", "backward-before"),
)
OTHERS = ((1, "lv-xattn"), (3, "ring"), (4, "gather"), (3, "replicated"))


class Ours:
    """The reference on virtual ranks; its fp64 results are cast."""

    def __call__(self, q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
        out, lse = cross_attention(q, k, v, comm, **options)
        return out.astype(q.dtype), lse.astype(np.result_type(q.dtype, np.float32))

    def backward(self, dout: Any, q: Any, *others: Any, **options: Any) -> Any:
        return tuple(
            x.astype(q.dtype) for x in cross_attention_backward(dout, q, *others, **options)
        )


class ProductsInHalf:
    """Attention by a library whose products of matrices come in the dtype of the factors."""

    def __call__(self, q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        assert mask is None
        s = scale * q.astype("f4") @ k.astype("f4").swapaxes(-1, -2)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        total = p.sum(axis=-1, keepdims=True)
        out = self._product(p, v, q.dtype) / total
        return out.astype(q.dtype), (s.max(axis=-1, keepdims=True) + np.log(total))[..., 0]

    def backward(
        self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, **options: Any
    ) -> Any:
        wide = [x.astype("f4") for x in (dout, q, k, v, out)]
        p = np.exp(options["scale"] * wide[1] @ wide[2].swapaxes(-1, -2) - lse[..., None])
        delta = (wide[0] * wide[4]).sum(axis=-1)
        ds = p * (wide[0] @ wide[3].swapaxes(-1, -2) - delta[..., None])
        dq = options["scale"] * self._product(ds, k, q.dtype)
        dk = options["scale"] * self._product(ds.swapaxes(-1, -2), q, q.dtype)
        dv = self._product(p.swapaxes(-1, -2), dout, q.dtype)
        return tuple(x.astype(q.dtype) for x in (dq, dk, dv))

    def _product(self, x: Any, y: Any, dtype: Any) -> Any:
        return (x.astype(dtype).astype("f4") @ y.astype("f4")).astype(dtype).astype("f4")


def checked(fn: Any, ranks: int, cases: Any = FEW, **options: Any) -> Report:
    cases = None if cases is None else [case_of(name) for name in cases]
    report = check_distributed(fn, ranks=ranks, cases=cases, **options)
    assert report is not None
    return report


def launched(start: Any, P: int, **wishes: Any) -> Ended:
    ended: Ended = start(P, PROGRAM, json.dumps(wishes), timeout=120)
    assert not ended.timed_out, ended.err
    assert not ended.left
    return ended


def reported(ended: Ended) -> Any:
    """Return the summary of a check that must pass."""
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    assert report["passed"], report["text"]
    assert set(report["results"]) == set(RESULTS)
    return report


class TestSweep:
    @pytest.mark.parametrize("suite", ["quick", "full"])
    @pytest.mark.parametrize("size", [2, 3, 4, 64])
    def test_cases_cover_all_ranks_and_cuts(self, suite: str, size: int) -> None:
        cases = [case for case in suite_of(suite) if case.group != "combinations"]
        sweep = sweep_of(cases, size, suite)
        kinds: dict[str, set[str]] = {}
        for case in cases:
            cuts = sweep[case.name]
            assert Cut(size, "even") in cuts
            assert {cut.kind for cut in cuts} > {"even"}
            kinds.setdefault(case.group, set()).update(cut.kind for cut in cuts)
        assert all(found == set(CUTS) for found in kinds.values())
        numbers = {(cut.kind, cut.P) for cuts in sweep.values() for cut in cuts}
        smaller = {P for P in range(1, size + 1) if P <= 8 or P in (16, 32, 64)}
        assert {P for kind, P in numbers if kind == "even"} == smaller
        assert {P for kind, P in numbers if kind != "even"} == smaller - {1}
        for kind in CUTS[1:]:
            assert {P for other, P in numbers if other == kind} == smaller - {1}

    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    def test_combinations_take_turns(self, size: int) -> None:
        sweep = sweep_of(covering(), size, "full")
        assert all(len(cuts) == 1 for cuts in sweep.values())
        smaller = range(1, size + 1)
        every = {Cut(P, kind) for P in smaller for kind in CUTS if P > 1 or kind == "even"}
        assert {cut for cuts in sweep.values() for cut in cuts} == every

    def test_one_rank_runs_every_case_once(self) -> None:
        assert set(map(tuple, sweep_of(suite_of("quick"), 1, "quick").values())) == {
            (Cut(1, "even"),)
        }

    @pytest.mark.parametrize("kind", CUTS)
    @pytest.mark.parametrize("P", [1, 2, 3, 7])
    @pytest.mark.parametrize("case", ["random-mask", "padding-mask", "grouped-heads"])
    def test_shards_join_to_the_problem(self, kind: str, P: int, case: str) -> None:
        problem, cut = draw(case_of(case), "float64", 3), Cut(P, kind)
        parts = [cut.part(problem, rank) for rank in range(P)]
        for name in ("q", "k", "v", "dout"):
            whole = join_parts([{name: getattr(part, name)} for part in parts])[name]
            assert np.array_equal(whole, getattr(problem, name))
        if isinstance(problem.mask, np.ndarray):
            columns = np.concatenate([part.mask for part in parts], axis=-1)
            assert np.array_equal(columns, problem.mask)
        lengths = {(part.q.shape[2], part.k.shape[2]) for part in parts}
        if kind == "ragged" and P > 1:
            assert any(s_q == 0 for s_q, _ in lengths)
            assert any(s_kv == 0 for _, s_kv in lengths)
        if kind == "first":
            assert [part.k.shape[2] > 0 for part in parts] == [True, *[False] * (P - 1)]
        if kind == "last":
            assert [part.q.shape[2] > 0 for part in parts] == [*[False] * (P - 1), True]


class TestVirtualRanks:
    def test_the_reference_passes(self) -> None:
        report = checked(Ours(), 3, None, dtypes=["float64"])
        assert report.passed, str(report)
        assert {row.where for row in report.rows} >= {"P=1, even", "P=2, ragged", "P=3, last"}
        judged = {tuple(verdict.name for verdict in row.verdicts) for row in report.rows}
        assert judged == {RESULTS}

    def test_ranks_of_different_speed_repeat_calls_equally_often(self) -> None:
        calls = [0, 0, 0]

        def uneven(q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
            calls[comm.rank] += 1
            time.sleep(0.005 * comm.rank)
            return np.zeros_like(q)

        ranks, problem = VirtualRanks(3, 30), draw(case_of("repeated"), "float64", 0)
        with closing(ranks):
            RanksCaller(uneven, framework_of("numpy"), None, False, ranks).call(
                problem, cut=Cut(3, "even")
            )
        assert calls[0] == calls[1] == calls[2] > 20

    @pytest.mark.parametrize("P", [16, pytest.param(64, marks=pytest.mark.slow)])
    def test_correct_function_passes_on_many_ranks(self, P: int) -> None:
        report = checked(Planted(blocks_in_half=True, round_p=True), P, dtypes=["bfloat16"])
        assert report.passed, str(report)
        assert any(f"growth of the error from P=1 to P={P}" in note for note in report.notes)

    @pytest.mark.slow
    def test_correct_function_passes_quick_suite(self) -> None:
        report = checked(Planted(), 3, None, dtypes=["float32"])
        assert report.passed, str(report)

    @pytest.mark.parametrize(
        "fault", ["last rank dropped", "unweighted merge", "mask of rank 0", "neighbour at odd P"]
    )
    def test_a_wrong_function_fails(self, fault: str) -> None:
        report = checked(Planted(fault), 3, dtypes=["float32"])
        assert not report.passed
        assert all(not row.where.startswith("P=1") for row in report.failed)
        if fault == "neighbour at odd P":
            assert {row.where[:3] for row in report.failed} == {"P=3"}
        if fault == "mask of rank 0":
            assert {row.case for row in report.failed} == {"random-mask"}

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("raises", "rank 1 of 3: ValueError: no such thing"),
            ("hangs", "did not come back within 0.2 s"),
            ("another rank's shape", "out: "),
            ("unsupported on one rank", "rank 1 of 3: unsupported there, not everywhere: not here"),
        ],
    )
    def test_error_on_one_rank_is_reported_and_other_cases_run(
        self, fault: str, message: str
    ) -> None:
        report = checked(Planted(fault), 3, dtypes=["float64"], time_limit=0.2)
        on_3 = [row for row in report.rows if row.where.startswith("P=3")]
        assert {row.status for row in on_3} == {"error"}
        assert message in str(report)
        if fault != "another rank's shape":
            assert [row.status for row in report.rows if row.where == "P=1, even"] == ["ok"] * 2

    def test_a_deadlock_is_an_error(self) -> None:
        def fn(q: Any, k: Any, v: Any, comm: Any, **_: Any) -> Any:
            return Planted()(q, k, v, comm, **_) if comm.size == 1 else comm.recv(comm.rank)

        report = checked(fn, 2, dtypes=["float64"], backward=False)
        assert all("deadlock" in row.message for row in report.failed)
        assert report.failed

    def test_rank_that_exits_is_an_error(self) -> None:
        def fn(q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
            return Planted()(q, k, v, comm, **options) if comm.rank == 0 else sys.exit(3)

        report = checked(fn, 2, dtypes=["float64"], backward=False)
        assert report.failed
        assert all("rank 1 of 2: SystemExit: 3" in row.message for row in report.failed)

    def test_unsupported_on_all_ranks_is_no_failure(self) -> None:
        def fn(q: Any, k: Any, v: Any, comm: Any, *, scale: float, mask: Any) -> Any:
            if mask is not None:
                if comm.rank:  # rank 0 has said so by the time that this one sends
                    time.sleep(0.02)
                    comm.send([], comm.rank)
                raise NotImplementedError("masks")
            return Planted()(q, k, v, comm, scale=scale, mask=mask)

        report = checked(fn, 3, dtypes=["float64"], backward=Planted().backward)
        assert report.passed
        assert {row.case for row in report.rows if row.status == "unsupported"} == {"random-mask"}


class TestGrowth:
    @pytest.mark.parametrize(
        ("fault", "grown"),
        [("merge in half", "out"), ("dq in half", "dq"), ("dkv in half", "dk")],
    )
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_sums_in_half_precision_are_caught_on_four_ranks(
        self, fault: str, grown: str, dtype: str
    ) -> None:
        report = checked(Planted(fault, round_p=True), 4, (), dtypes=[dtype])
        (row,) = report.failed
        assert row.case == "growth-with-ranks"
        assert grown in {verdict.name for verdict in row.verdicts if not verdict.passed}

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_blocks_pass(self, dtype: str) -> None:
        assert checked(Planted(blocks_in_half=True), 4, (), dtypes=[dtype]).passed

    @pytest.mark.parametrize(("growth", "status"), [(1.23, "ok"), (1.25, "wrong"), (0.8, "ok")])
    def test_errors_are_pooled_over_seeds(self, growth: float, status: str) -> None:
        def row(where: str, seed: int, error: float) -> Row:
            verdict = Verdict("dq", error, 1.0, error, "", (), 0.0, 0.0, 0.0, 0.0, 0.0)
            return Row(
                "growth", "growth", GROWTH.reason, "float16", seed, "ok", (verdict,), where=where
            )

        rows = [row("P=1, even", seed, 1e-3) for seed in range(2)]
        rows += [row("P=5, even", 0, 0.0), row("P=5, even", 1, 2**0.5 * growth * 1e-3)]
        (found,), (note,) = judged_growth(rows, ["float32", "float16"], 5)
        assert found.status == status
        assert f"dq {growth:.2f}; limit {LIMIT}" in note

    def test_unjudgeable_drift_is_reported(self) -> None:
        assert "needs 4 ranks" in str(checked(Planted(), 3, dtypes=["float16"]))
        assert "needs float16 or bfloat16" in str(checked(Planted(), 4, dtypes=["float64"]))


class TestLimit:
    def test_half_precision_products_pass(self) -> None:
        case = case_of("offset-values")
        report = check(ProductsInHalf(), dtypes=["bfloat16"], seeds=60, cases=[case])
        assert report.passed, str(report)


class TestOutcomes:
    def test_missing_result_on_one_rank_is_an_error(self) -> None:
        x = np.zeros((1, 1, 2, 3))
        both, one = Outcome("ok", results={"out": x, "lse": x}), Outcome("ok", results={"out": x})
        with pytest.raises(ContractError, match=r"lse: .* not returned by rank 1 of 3"):
            joined([both, one, both], 30.0)

    def test_failed_rank_is_named_before_waiting_ranks(self) -> None:
        outcomes = [Outcome("late"), Outcome("error", "broken"), Outcome("ok"), Outcome("silent")]
        with pytest.raises(
            ContractError,
            match=r"^rank 1 of 4: broken; ranks 0 and 3 of 4 did not come back within 30 s "
            r"\(rank 2 of 4 did\)$",
        ):
            joined(outcomes, 30.0)

    @pytest.mark.parametrize(
        ("statuses", "raised"),
        [
            (["ok", "ok"], [None, None]),
            (["error", "ok"], [ValueError, ElsewhereError]),
            (["ok", "unsupported"], [UnsupportedElsewhereError, NotImplementedError]),
            (["unsupported", "unsupported"], [NotImplementedError, NotImplementedError]),
            (["unsupported", "error"], [ElsewhereError, ValueError]),
        ],
    )
    def test_all_ranks_raise_or_none(self, statuses: list[str], raised: list[Any]) -> None:
        errors = {"ok": None, "error": ValueError(), "unsupported": NotImplementedError()}
        found = [error_to_raise(errors[status], statuses) for status in statuses]
        assert [error and type(error) for error in found] == raised


class TestArguments:
    @pytest.mark.parametrize("ranks", [0, -1])
    def test_too_few_ranks_raise(self, ranks: int) -> None:
        with pytest.raises(ValueError, match="ranks: expected at least 1, got"):
            check_distributed(Planted(), ranks=ranks)

    @pytest.mark.parametrize("ranks", [True, "4", 2.0])
    def test_ranks_of_wrong_type_raise(self, ranks: Any) -> None:
        with pytest.raises(TypeError, match="ranks: expected a number of virtual ranks"):
            check_distributed(Planted(), ranks=ranks)


@pytest.mark.mpi
class TestRealRanks:
    @pytest.mark.parametrize(
        ("P", "schedule", "cases"),
        [
            (4, "lv-xattn", None),
            *[(P, schedule, SOME) for P, schedule in OTHERS],
            *[pytest.param(*other, None, marks=pytest.mark.slow) for other in OTHERS],
        ],
        ids=lambda x: {SOME: "some", None: "all"}.get(x, x),
    )
    def test_mpi_impl_passes(self, P: int, schedule: str, cases: tuple[str, ...] | None) -> None:
        dtypes = ["bfloat16"] if P == 4 else ["float64"]
        ended = launched(mpiexec, P, schedule=schedule, dtypes=dtypes, cases=cases)
        report = reported(ended)
        assert not ended.err
        assert report["statuses"] == ["ok"]
        assert (f"P={P}, ragged" in report["where"]) == (P > 1)
        assert ("growth of the error from P=1 to P=4, bfloat16" in report["text"]) == (P == 4)

    @pytest.mark.parametrize(("heads", "statuses"), [(3, ["ok"]), (1, ["ok", "unsupported"])])
    def test_ulysses_passes_or_is_unsupported(self, heads: int, statuses: list[str]) -> None:
        cases = ["gaussian", "random-mask", "callable-mask", "mask-over-heads", "ragged-lengths"]
        options = {"heads": heads, "cases": cases, "dtypes": ["float32"]}
        ended = launched(mpiexec, 3, schedule="ulysses", **options)
        assert reported(ended)["statuses"] == statuses

    def test_torch_impl_passes(self) -> None:
        report = reported(launched(forked, 3, schedule="lv-xattn", dtypes=["bfloat16"]))
        assert report["statuses"] == ["ok"]
        assert "P=3, ragged" in report["where"]

    def test_error_on_one_rank_is_reported_and_other_cases_run(self) -> None:
        fault = {"fault": "another rank's shape"}
        ended = launched(mpiexec, 3, planted=fault, cases=FEW, dtypes=["float64"])
        assert ended.status == 0, ended.err
        report = json.loads(ended.out)
        assert report["statuses"] == ["error", "ok"]
        assert "of 3: out: " in report["text"]

    def test_hanging_ranks_are_ended_after_the_report(self) -> None:
        ended = launched(mpiexec, 3, planted={"fault": "raises"}, cases=FEW, time_limit=0.5)
        assert ended.status == 1
        assert "ranks 0 and 2 of 3 did not come back within 0.5 s" in ended.out
        assert "the rest was not run" in ended.out
        assert "rank 1 of 3: ValueError: no such thing" in ended.out

    def test_torch_ranks(self) -> None:
        ended = launched(forked, 2, waits=True, cases=FEW, time_limit=0.5)
        assert ended.status == 1
        assert "rank 1 of 2: ValueError: no such thing" in ended.out
        assert "the rest was not run" in ended.out
