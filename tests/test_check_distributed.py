"""Distributed functions: correct ones pass on all kinds of ranks, wrong ones fail."""

import json
import re
import sys
import time
from contextlib import closing
from itertools import combinations, product
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
from lvxattn.check.covering import covering, rows
from lvxattn.check.frameworks import framework_of
from lvxattn.check.growth import GROWTH, LIMIT, growth_case, judged_growth
from lvxattn.check.judge import RESULTS, Verdict
from lvxattn.check.one_call import ContractError
from lvxattn.check.ranks import RanksCaller, VirtualRanks
from lvxattn.check.ranks.tasks import (
    ElsewhereError,
    Outcome,
    UnsupportedElsewhereError,
    error_to_raise,
    joined,
)
from lvxattn.check.shards import CUTS, Cut, join_parts
from lvxattn.check.sweep import ASCENDING, sweep_of, ways
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


def group_of(cut: Cut, size: int) -> str:
    """Return the kind of a cut's group of ranks."""
    ranks = cut.ranks or tuple(range(cut.P))
    assert len(ranks) == len({*ranks}) == cut.P
    assert {*ranks} <= {*range(size)}
    if ranks == tuple(range(cut.P)):
        assert not cut.ranks
        return "first"
    if ranks == tuple(range(size - cut.P, size)):
        return "last"
    return "strided" if ranks == tuple(sorted(ranks)) else "reversed"


def features(cuts: Any, size: int) -> dict[str, set[Any]]:
    """Return the numbers of ranks, cuts and groups that occur, and their pairs."""
    every = [(cut.P, cut.kind, group_of(cut, size)) for cut in cuts]
    axes = {"P": (0,), "cut": (1,), "group": (2,)}
    pairs = {f"{x} {y}": axes[x] + axes[y] for x, y in combinations(axes, 2)}
    return {
        name: {tuple(values[n] for n in which) for values in every}
        for name, which in (axes | pairs).items()
    }


class TestSweep:
    @pytest.mark.parametrize("suite", ["quick", "full"])
    @pytest.mark.parametrize("size", [2, 3, 4, 64])
    def test_pairs_of_ranks_cuts_and_groups_are_covered(self, suite: str, size: int) -> None:
        cases = suite_of(suite)
        sweep = sweep_of(cases, size, suite, turn=1)
        found = features({cut for cuts in sweep.values() for cut in cuts}, size)
        numbers = [P for P in range(1, size + 1) if P <= 8 or P in (16, 32, 64)]
        groups = ("first", "last", "strided", "reversed")
        assert found["P"] == {(P,) for P in numbers}
        # One rank is cut evenly; it is the first or the last.
        assert found["P cut"] == {(1, "even"), *product(numbers[1:], CUTS)}
        assert found["P group"] >= {*product(numbers[2:-1], groups)}
        assert found["P group"] >= {(1, "first"), (1, "last"), (size, "first"), (size, "reversed")}
        assert found["cut group"] == {(c, g) for c in CUTS for g in groups
                                      if size > 2 or g in ("first", "reversed")} | (
            {("even", "last")} if size == 2 else set()
        )  # fmt: skip

    @pytest.mark.parametrize("suite", ["quick", "full"])
    @pytest.mark.parametrize("size", [2, 3, 4, 64])
    def test_cases_are_covered(self, suite: str, size: int) -> None:
        cases = [case for case in suite_of(suite) if case.group != "combinations"]
        sweep = sweep_of(cases, size, suite)
        every = features(ways(size), size)
        of_group: dict[str, list[Cut]] = {}
        for case in cases:
            cuts = sweep[case.name]
            assert len({*cuts}) == len(cuts)
            assert cuts[0] == Cut(size, "even")
            assert {cut.P for cut in cuts} > {size}
            assert any(cut.kind != "even" or group_of(cut, size) == "reversed" for cut in cuts)
            of_group.setdefault(case.group, []).extend(cuts)
            if suite == "full":
                found = features(cuts, size)
                assert all(found[name] == every[name] for name in ("P", "cut", "group"))
        for group, cuts in of_group.items():
            found = features(cuts, size)
            names = every if suite == "full" else ("cut", "group")
            if group.startswith("mask"):
                names = (*names, "cut group")
            assert all(found[name] == every[name] for name in names)

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
    def test_combinations_are_covered(self, size: int) -> None:
        sweep = sweep_of(covering(), size, "full")
        every = features(ways(size), size)
        found: dict[Any, list[Cut]] = {}
        for case, row in zip(covering(), rows(), strict=True):
            assert sweep[case.name]
            for factor in row.items():
                found.setdefault(factor, []).extend(sweep[case.name])
        for cuts in found.values():
            of_factor = features(cuts, size)
            assert all(of_factor[name] == every[name] for name in ("P", "cut", "group"))
        assert sum(map(len, sweep.values())) < 1.3 * len(covering())

    def test_quick_suite_stays_quick(self) -> None:
        for size in (2, 3, 4, 64):
            sweep = sweep_of(suite_of("quick"), size, "quick")
            assert sum(map(len, sweep.values())) < 3.3 * len(sweep)

    def test_few_cases_get_few_cuts(self) -> None:
        sweep = sweep_of([case_of("gaussian")], 64, "quick")
        assert len(sweep["gaussian"]) < 8

    @pytest.mark.parametrize("turn", range(4))
    def test_four_ranks_are_cut_in_every_way(self, turn: int) -> None:
        sweep = sweep_of(suite_of("quick"), 4, "quick", turn)
        assert {cut for cuts in sweep.values() for cut in cuts} == {*ways(4)}
        assert turn == 0 or sweep != sweep_of(suite_of("quick"), 4, "quick")

    def test_sorted_groups(self) -> None:
        sweep = sweep_of(suite_of("quick"), 4, "quick", groups=ASCENDING)
        found = {group_of(cut, 4) for cuts in sweep.values() for cut in cuts}
        assert found == {"first", "last", "strided"}

    def test_virtual_ranks_have_one_group(self) -> None:
        sweep = sweep_of(suite_of("quick"), 3, "quick", groups=VirtualRanks.groups)
        assert not any(cut.ranks for cuts in sweep.values() for cut in cuts)

    @pytest.mark.parametrize(
        ("cuts", "usual"),
        [
            (("divisible",), "divisible"),
            (("ragged", "divisible"), "divisible"),
            (("last", "even"), "even"),
            (("ragged",), "ragged"),
        ],
    )
    def test_only_chosen_cuts(self, cuts: tuple[str, ...], usual: str) -> None:
        sweep = sweep_of(suite_of("full"), 3, "full", cuts=cuts)
        found = {cut for of_case in sweep.values() for cut in of_case}
        assert {cut.kind for cut in found} == {*cuts}
        assert {cut.kind for cut in found if cut.P == 1} == {usual}
        assert {cut.P for cut in found} == {1, 2, 3}

    @pytest.mark.parametrize("P", [1, 2, 3, 4, 7])
    def test_divisible_cuts_are_equal(self, P: int) -> None:
        cut = Cut(P, "divisible")
        for case in suite_of("full"):
            fitted = cut.fitted(case)
            lengths = fitted.S_Q, fitted.S_KV
            assert all(n % P == 0 and n > 0 for n in lengths)
            assert all(
                abs(n - given) < P for n, given in zip(lengths, (case.S_Q, case.S_KV), strict=True)
            )
            assert (fitted.name == case.name) == (lengths == (case.S_Q, case.S_KV))
            assert {(q.stop - q.start) * P for q, _ in cut.slices(fitted, 0)} == {fitted.S_Q}
            assert {(k.stop - k.start) * P for _, k in cut.slices(fitted, 0)} == {fitted.S_KV}
            if fitted.data == "one-hot":
                assert fitted.S_KV <= 64

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
            ("hangs", "did not come back within 1 s"),
            ("another rank's shape", "out: "),
            ("unsupported on one rank", "rank 1 of 3: unsupported there, not everywhere: not here"),
        ],
    )
    def test_error_on_one_rank_is_reported_and_other_cases_run(
        self, fault: str, message: str
    ) -> None:
        # One rank has all of a second for what takes a hundredth.
        limit = 1 if fault == "hangs" else 30
        report = checked(Planted(fault), 3, dtypes=["float64"], time_limit=limit)
        on_3 = [row for row in report.rows if row.where.startswith("P=3")]
        assert {row.status for row in on_3} == {"error"}
        assert message in str(report)
        if fault != "another rank's shape":
            assert {row.status for row in report.rows if row.where == "P=1, even"} == {"ok"}

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


class EqualShards(Ours):
    """Takes nothing but shards of equal length."""

    def __call__(self, q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
        lengths = comm.allgather((q.shape[2], k.shape[2]))
        if len({*lengths}) > 1:
            raise ValueError(f"shards must be equal, got {lengths}")
        return super().__call__(q, k, v, comm, **options)


class TestCuts:
    CASES = ("gaussian", "ragged-lengths", "one-query", "one-key", "one-hot-table", "hidden-rows")

    @pytest.mark.parametrize("ranks", [3, 4])
    def test_function_of_equal_shards_passes_where_lengths_divide(self, ranks: int) -> None:
        options: dict[str, Any] = {"dtypes": ["float64"], "cuts": ["divisible"]}
        report = checked(EqualShards(), ranks, self.CASES, **options)
        assert report.passed, str(report)
        assert {row.where for row in report.rows} >= {f"P={ranks}, divisible", "P=1, divisible"}
        assert f"ragged-lengths.by-{ranks}" in {row.case for row in report.rows}
        assert {row.case.partition(".")[0] for row in report.rows} == {*self.CASES}
        assert not checked(EqualShards(), ranks, self.CASES, dtypes=["float64"]).passed

    def test_wrong_function_of_equal_shards_fails(self) -> None:
        report = checked(
            Planted("unweighted merge"), 3, dtypes=["float32"], cuts=("divisible", "last")
        )
        cuts = {row.where.partition(", ")[2] for row in report.failed}
        assert cuts == {"divisible", "last"}
        assert "fails only where P > 1: " in str(report)

    @pytest.mark.parametrize("size", [4, 5, 6, 7])
    def test_growth_is_judged_on_equal_shards(self, size: int) -> None:
        case = growth_case(size)
        assert case.name == GROWTH.name
        assert (case.S_Q % size, case.S_KV % size) == (0, 0)
        assert 0 <= case.S_Q - GROWTH.S_Q < size


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

    @pytest.mark.parametrize(
        ("cuts", "error", "got"),
        [
            ("even", TypeError, "'even'"),
            (3, TypeError, "3"),
            ([], ValueError, "none"),
            (["even", "uneven"], ValueError, "'uneven'"),
            ([["even"]], ValueError, "['even']"),
        ],
    )
    def test_unknown_cuts_raise(self, cuts: Any, error: type[Exception], got: str) -> None:
        expected = "cuts: expected a sequence of even, ragged, first, last, divisible, got "
        with pytest.raises(error, match=re.escape(expected + got)):
            check_distributed(Planted(), ranks=2, cuts=cuts)


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
        assert any(where.startswith(f"P={P}, ragged") for where in report["where"]) == (P > 1)
        assert any(" ranks " in where for where in report["where"]) == (P > 1)
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
        assert {"P=3, ragged", "P=2, even, ranks 1 2"} <= {*report["where"]}

    def test_long_results_reach_the_judge(self) -> None:
        # The first rank's dk and dv have more than 8 MiB, which a store of PyTorch refuses.
        long = [x.name for x in covering() if x.B * x.H_KV * x.S_KV * (x.D + x.D_V) > 2**20]
        wishes = {"cases": long[:1], "dtypes": ["float32"], "cuts": ["first"]}
        assert reported(launched(forked, 2, schedule="gather", **wishes))["rows"] > 0

    def test_error_on_one_rank_is_reported_and_other_cases_run(self) -> None:
        fault = {"fault": "another rank's shape"}
        ended = launched(mpiexec, 3, planted=fault, cases=FEW, dtypes=["float64"])
        assert ended.status == 0, ended.err
        report = json.loads(ended.out)
        assert report["statuses"] == ["error", "ok"]
        assert "of 3: out: " in report["text"]

    @pytest.mark.parametrize("start", [mpiexec, forked])
    def test_rank_of_the_world_is_wrong_in_other_groups(self, start: Any) -> None:
        ended = launched(start, 4, planted={"fault": "world rank"}, cases=FEW, dtypes=["float32"])
        assert ended.status == 0, ended.err
        report = json.loads(ended.out)
        assert report["failed"] == sorted(FEW)
        assert all(" rank" in where for where in report["failed_where"])
        assert "fails only where group of ranks is not 0 to P-1: " in report["text"]

    def test_offset_of_the_rank_of_the_world(self) -> None:
        fault, cases = {"fault": "offset of the world rank"}, (*FEW, "callable-mask")
        ended = launched(mpiexec, 3, planted=fault, cases=cases, dtypes=["float32"])
        assert ended.status == 0, ended.err
        report = json.loads(ended.out)
        assert report["failed"] == ["callable-mask"]
        assert all(" rank" in where for where in report["failed_where"])

    @pytest.mark.parametrize("start", [mpiexec, forked])
    def test_group_without_rank_0_that_hangs_is_ended(self, start: Any) -> None:
        fault = {"fault": "raises away from rank 0"}
        ended = launched(start, 3, planted=fault, cases=FEW, time_limit=5, dtypes=["float64"])
        assert ended.status == 1
        assert "rank 1 of 2: ValueError: no such thing" in ended.out
        assert "rank 0 of 2 did not come back within 5 s" in ended.out
        assert "the rest was not run" in ended.out

    def test_hanging_ranks_are_ended_after_the_report(self) -> None:
        ended = launched(mpiexec, 3, planted={"fault": "raises"}, cases=FEW, time_limit=0.5)
        assert ended.status == 1
        assert "ranks 0 and 2 of 3 did not come back within 0.5 s" in ended.out
        assert "the rest was not run" in ended.out
        assert "rank 1 of 3: ValueError: no such thing" in ended.out

    def test_no_group_of_a_failing_function_is_left(self) -> None:
        ended = launched(forked, 2, holds=True, cases=["gaussian"], dtypes=["float32"])
        assert ended.status == 0, ended.err
        calls, left = json.loads(ended.out)["groups"]
        assert calls > 1
        assert left == 0

    def test_torch_ranks(self) -> None:
        ended = launched(forked, 2, waits=True, cases=FEW, time_limit=0.5)
        assert ended.status == 1
        assert "rank 1 of 2: ValueError: no such thing" in ended.out
        assert "the rest was not run" in ended.out
