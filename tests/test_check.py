"""`check`: correct functions pass, arguments are validated, reports are readable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.check import Report, Row, Verdict, check, draw, suite_of
from lvxattn.check.cases import DTYPES
from tests.errors import says
from tests.oracle import GAUSSIAN, TWO, checked, right, right_backward


def wrong(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    """Scale twice."""
    return right(q, k, v, scale=scale**2, mask=mask)


def row(case: str = "a", status: str = "ok", ratio: float = 0.5, **about: Any) -> Row:
    verdict = Verdict("out", 1e-3, 1e-2, ratio, "", (0, 1, 2), 1.5, 1.0, 0.5, 7.0, 2.0)
    given = {"group": "g", "reason": "why", "dtype": "float32", "seed": 0, "verdicts": (verdict,)}
    return Row(case=case, status=status, **given | about)


def report_of(rows: Any, **about: Any) -> Report:
    return Report("module:name", "quick", "numpy", tuple(rows), 1.25, **about)


# The suite.


def test_correct_function_passes_quick_suite_in_every_dtype() -> None:
    report = check(right, dtypes=DTYPES, backward=right_backward, seeds=2)
    report.raise_if_failed()
    cases = suite_of("quick")
    assert [(r.case, r.dtype, r.seed) for r in report.rows] == [
        (case.name, dtype, seed) for case in cases for dtype in DTYPES for seed in range(2)
    ]
    assert {len(r.verdicts) for r in report.rows} == {5}
    assert report.notes == ()
    assert 0 < report.worst_ratio <= 1
    assert report.target == "tests.oracle:right"


def test_dtypes_of_quick_and_full_suite() -> None:
    assert {r.dtype for r in checked(right, dtypes=None).rows} == {"float64", "float32"}
    report = checked(right, dtypes=None, suite="full")
    assert {r.dtype for r in report.rows} == set(DTYPES)


def test_wrong_function_fails_with_error_and_place() -> None:
    report = checked(wrong)
    assert not report.passed
    found = {r.case: [v.name for v in r.verdicts if not v.passed] for r in report.failed}
    # With one key, only lse tells how it was scaled.
    assert found == {"one-key": ["lse"], "gaussian": ["out", "lse"]}
    with pytest.raises(AssertionError, match=r"out: relative error .*, limit "):
        report.raise_if_failed()


def test_seeds_give_different_problems() -> None:
    given: list[Any] = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        given.append(q)
        return right(q, k, v, scale=scale, mask=mask)

    checked(fn, [GAUSSIAN], seeds=3)
    for seed, q in enumerate(given):
        assert (q == draw(GAUSSIAN, "float64", seed).q).all()


def test_package_exports() -> None:
    from lvxattn import check as package

    assert all(hasattr(package, name) for name in package.__all__)
    assert not hasattr(reference, "judge")


# Arguments.


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"fn": 3}, TypeError, "^fn: expected a function, got int 3"),
        ({"suite": "slow"}, ValueError, says("suite", "quick, full", "'slow'")),
        ({"dtypes": "float32"}, TypeError, "^dtypes: expected a sequence of names, got 'float32'"),
        ({"dtypes": 32}, TypeError, says("dtypes", 32)),
        ({"dtypes": []}, ValueError, "^dtypes: expected at least one of float64"),
        ({"dtypes": ["int8"]}, ValueError, "^dtypes: expected some of float64, .* got 'int8'"),
        ({"dtypes": [["float32"]]}, ValueError, says("dtypes", "['float32']")),
        ({"dtypes": [np.float32]}, ValueError, says("dtypes", "numpy.float32")),
        ({"backward": 1}, TypeError, "^backward: expected True, False or a function, got 1"),
        ({"backward": None}, TypeError, says("backward", None)),
        ({"framework": "theano"}, ValueError, says("framework", "numpy", "'theano'")),
        ({"device": "cuda"}, ValueError, "^device: expected cpu with numpy, got 'cuda'"),
        ({"seeds": 0}, ValueError, "^seeds: expected a whole number, at least 1, got 0"),
        ({"seeds": 1.5}, ValueError, says("seeds", 1.5)),
        ({"seeds": True}, ValueError, says("seeds", True)),
        ({"time_limit": 0}, ValueError, "^time_limit: expected seconds, more than 0, got 0"),
        ({"time_limit": "9"}, ValueError, says("time_limit", "'9'")),
        ({"time_limit": np.nan}, ValueError, says("time_limit", "nan")),
        ({"cases": ["gaussian"]}, TypeError, "^cases: expected Case objects, .* got 'gaussian'"),
    ],
)
def test_bad_argument_raises(given: dict[str, Any], error: Any, text: str) -> None:
    options = {"fn": right, "cases": TWO} | given
    with pytest.raises(error, match=text):
        check(options.pop("fn"), **options)


def test_bad_backward_attribute_raises() -> None:
    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return right(q, k, v, scale=scale, mask=mask)

    fn.backward = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"^fn.backward: expected a function, got int 3"):
        check(fn)
    assert checked(fn, backward=False).passed


def test_infinite_time_limit_is_accepted() -> None:
    assert checked(right, time_limit=np.inf).passed


# Reports.


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    rows = [
        row(),
        row("b", "wrong", np.inf, where="P = 3"),
        row("c", "error", verdicts=(), message="ValueError: x"),
    ]
    nan = Verdict("lse", 0.0, 0.0, np.inf, "1 NaN", (0,), np.nan, -np.inf, 0.0, 0.0, 0.0)
    rows.append(row("d", "wrong", verdicts=(nan,)))
    report_of(rows, notes=("one",), probably="it").to_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert text.endswith("}\n")
    found = json.loads(text, parse_constant=refuse)
    assert found["schema"] == 1
    target = [found[key] for key in ("target", "suite", "framework")]
    assert target == ["module:name", "quick", "numpy"]
    assert (found["passed"], found["worst_ratio"], found["seconds"]) == (False, "inf", 1.25)
    assert (found["notes"], found["probably"]) == (["one"], "it")
    assert found["versions"]["numpy"] == np.__version__
    assert {"lvxattn", "python"} < set(found["versions"])
    first, second, third, fourth = found["rows"]
    assert first["verdicts"] == [
        {
            "name": "out", "error": 1e-3, "limit": 1e-2, "ratio": 0.5, "what": "", "passed": True,
            "index": [0, 1, 2], "got": 1.5, "expected": 1.0, "max_abs": 0.5, "ulps": 7.0,
            "flash": 2.0,
        }
    ]  # fmt: skip
    assert (second["verdicts"][0]["ratio"], second["where"]) == ("inf", "P = 3")
    assert (third["status"], third["message"]) == ("error", "ValueError: x")
    assert [fourth["verdicts"][0][key] for key in ("got", "expected")] == ["nan", "-inf"]


def test_json_of_real_check_is_strict(tmp_path: Path) -> None:
    report = checked(lambda q, k, v, *, scale, mask: np.full_like(q, np.nan), [GAUSSIAN], DTYPES)
    report.to_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert {r["verdicts"][0]["got"] for r in found["rows"]} == {"nan"}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_table_has_row_per_case_and_column_per_dtype(count: int) -> None:
    long = "a-name-that-is-much-longer-than-any-that-there-is"
    rows = [row(case, dtype=dtype) for case in ("one", long) for dtype in DTYPES[:count]]
    lines = str(report_of(rows)).splitlines()
    assert lines[0] == "LV-XAttn check of module:name: quick suite, numpy"
    head, *table = lines[2:5]
    for n, dtype in enumerate(DTYPES[:count]):  # columns end where their heads end
        end = head.index(dtype) + len(dtype)
        assert all(line[:end].endswith("out 0.50") for line in table), n
    assert [line.split()[0] for line in table] == ["one", long]
    assert len({len(line) for line in (head, *table)}) == 1


def test_wide_cells_stay_separated() -> None:
    rows = [row("a", "wrong", 1e14, dtype=dtype) for dtype in DTYPES]
    line = str(report_of(rows)).splitlines()[3]
    assert line.split() == ["a", *(["WRONG", "out", "1e+14"] * 4)]
    assert "14   WRONG" in line


def test_cell_shows_the_worst_row() -> None:
    rows = [row(ratio=0.2), row(ratio=0.7, seed=1), row(ratio=0.1, seed=2)]
    assert "out 0.70" in str(report_of(rows))
    assert "WRONG out 3.00" in str(report_of([*rows, row(status="wrong", ratio=3.0, seed=3)]))
    error = row(status="error", verdicts=(), message="it", seed=4)
    assert "ERROR" in str(report_of([*rows, error]))
    unsupported = row("u", status="unsupported", verdicts=(), message="no")
    assert "unsupported" in str(report_of([unsupported])).splitlines()[3]


def test_failure_shows_error_limit_and_place() -> None:
    text = str(report_of([row("b", "wrong", 2.0, diagnosis="looks like x", seed=3, where="P = 2")]))
    assert "  b, float32, seed 3, P = 2: why\n" in text
    assert "    out: relative error 1.0e-03, limit 1.0e-02\n" in text
    assert (
        "      at (0, 1, 2) got 1.5, expected 1; largest error 5.0e-01, 7 ulps, "
        "2 times that of plain float32\n" in text
    )
    assert "    looks like x\n" in text


def test_many_failures_are_truncated_and_counted() -> None:
    kinds = [row(f"case-{n}", "wrong", 2.0, group=f"g{n % 100}") for n in range(300)]
    report = report_of(kinds)
    text = str(report)
    assert text.count("relative error") == 12
    assert "    and 2 more alike: case-100, case-200\n" in text
    assert "  and 264 more failures\n" in text
    assert "0 of 300 passed, 300 wrong; largest error 2.00 of its limit (case-0, float32)" in text


def test_equal_failures_are_shown_once() -> None:
    rows = [row(f"c{n}", "error", verdicts=(), message="ValueError: x") for n in range(40)]
    text = str(report_of([*rows, row("other", "error", verdicts=(), message="y")]))
    assert text.count("ValueError: x") == 1
    assert "    and 39 more alike: c1, c2, c3," in text
    assert "    y\n" in text


def test_unsupported_cases_and_notes_are_shown() -> None:
    rows = [row(), *(row(f"u{n}", "unsupported", verdicts=(), message="no") for n in range(3))]
    text = str(report_of(rows, notes=("a note",), probably="matches x"))
    for line in ("  3 unsupported: no", "  a note", "  matches x"):
        assert line in text.splitlines()
    assert report_of(rows).passed


def test_nothing_judged_does_not_pass() -> None:
    for rows in ([], [row(status="unsupported", verdicts=(), message="no")]):
        report = report_of(rows)
        assert not report.passed
        assert report.worst_ratio == 0
        assert "  nothing was judged" in str(report)
        with pytest.raises(AssertionError, match="nothing was judged"):
            report.raise_if_failed()


def test_passed_report_raises_nothing_and_has_short_repr() -> None:
    report = checked(right)
    report.raise_if_failed()
    assert repr(report) == "<Report of tests.oracle:right: 2 of 2 passed>"


def test_lines_of_a_report_are_short() -> None:
    text = str(check(wrong, dtypes=["float32"]))
    assert max(map(len, text.splitlines())) <= 130
