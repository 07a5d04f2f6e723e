"""Check a function by a suite or by one case; list the cases."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.cases import Case, case_of, suite_of
from lvxattn.check.check_arguments import wanted_dtypes
from lvxattn.check.check_report import Report, Row
from lvxattn.check.command.launched import allgather
from lvxattn.check.covering import coverage
from lvxattn.check.distributed import check_distributed
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.golden_data import inputs_of, mask_text, write_tensors
from lvxattn.check.import_target import load
from lvxattn.check.judge import truth_for
from lvxattn.check.shards import CUTS
from lvxattn.check.suite import Caller, check, diagnosed
from lvxattn.check.sweep import coverage as coverage_of_cuts
from lvxattn.cli.arguments import UsageError, cannot_write

Array = npt.NDArray[Any]

_COLUMNS = ("error", "limit", "ratio", "max abs", "ulps", "flash")


def check_function(options: Namespace) -> int:
    """Check the function by a suite; print and write the report.

    With ``--distributed`` collective: every rank calls this.

    Returns
    -------
    int
        0, or 1 if something failed; the same on all ranks.

    Raises
    ------
    UsageError
        The same on all ranks.
    """
    if not options.distributed:
        arguments = _arguments(options)
        with _named_as_options():
            report = check(**arguments)
        return _output(report, options)
    problem, arguments = None, {}
    try:
        arguments = _arguments(options) | _functions(options)
    except UsageError as error:
        problem = str(error)
    problems = [text for text in allgather(problem, options.device) if text]
    if problems:
        raise UsageError(problems[0])
    found = check_distributed(
        **arguments,
        cuts=options.cuts or CUTS,
        report_early=lambda report: _output(report, options),
    )
    status = 0 if found is None else _output(found, options)
    return int(max(allgather(status, options.device)))


def _arguments(options: Namespace) -> dict[str, Any]:
    """Return `check`'s arguments, all validated."""
    _framework(options)
    try_file(options.json, "--json")
    return {
        **_names(options),
        "suite": options.suite or "quick",
        "dtypes": options.dtypes,
        "framework": options.framework,
        "device": options.device,
        "seeds": options.seeds or 1,
        "time_limit": options.time_limit or 30.0,
    }


def _framework(options: Namespace) -> Framework:
    """Return the framework; raise a UsageError unless it is installed and has the dtypes."""
    try:
        arrays = framework_of(options.framework, options.device)
        wanted_dtypes(options.dtypes, options.suite or "quick", arrays)
    except (ValueError, ImportError) as error:
        raise UsageError(f"--{error}") from None  # it begins with the argument's name
    return arrays


def _names(options: Namespace) -> dict[str, Any]:
    """Return the names of the function and of its backward: neither is imported here."""
    return {"fn": options.function, "backward": options.backward or not options.no_backward}


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Turn a ValueError that begins with an argument's name into a UsageError."""
    try:
        yield
    except ValueError as error:
        name, _, what = str(error).partition(":")
        option = {"fn": "function", "backward": "--backward"}.get(name, name)
        raise UsageError(f"{option}:{what}") from None


def _functions(options: Namespace) -> dict[str, Any]:
    """Import the function and its backward on a rank; raise a UsageError if that fails."""
    try:
        fn, named = load(options.function, "function"), options.backward
        backward = not options.no_backward if named is None else load(named, "--backward")
    except ValueError as error:
        raise UsageError(str(error)) from None
    return {"fn": fn, "backward": backward}


def try_file(path: str | None, argument: str) -> None:
    """Raise a UsageError unless a file can be written; an existing one is not changed."""
    problem = "" if path is None or path == "-" else cannot_write(path)
    if problem:
        raise UsageError(f"{argument}: {problem}")


def _output(report: Report, options: Namespace) -> int:
    """Print and write a report; return the exit status, 2 if it cannot be written."""
    if not options.quiet and options.json != "-":
        print(report, flush=True)
    return _write_json(report, options)


def _write_json(report: Report, options: Namespace) -> int:
    """Write a report to a file or stdout, if wanted; return the exit status."""
    if options.json == "-":
        print(report.as_json(), flush=True)
    try:
        if options.json not in (None, "-"):
            report.to_json(options.json)
    except OSError as error:  # no UsageError, as other ranks wait for the status
        text = f"lvxattn check: error: --json: {error.filename}: {error.strerror}"
        print(text, file=sys.stderr, flush=True)
        return 2
    return 0 if report.passed else 1


def run_case(options: Namespace) -> int:
    """Run one case and show it in detail; without a function, show only the problem.

    Returns
    -------
    int
        0, or 1 if it failed.

    Raises
    ------
    UsageError
    """
    try:
        case = case_of(options.case)
    except ValueError as error:
        raise UsageError(f"--{error}") from None  # it begins with case:
    arrays = _framework(options)
    dtypes = options.dtypes or arrays.usual
    if options.save is not None and len(dtypes) > 1:
        raise UsageError(f"--save: expected --dtypes with one dtype, got {', '.join(dtypes)}")
    try_file(options.save, "--save")
    try_file(options.json, "--json")
    caller, results = None, dict[str, Array]()
    if options.function is not None:
        with _named_as_options():
            caller = Caller(
                framework=arrays, time_limit=options.time_limit or 30.0, **_names(options)
            )

    def solve(problem: Problem, notes: list[str]) -> dict[str, Array]:
        assert caller is not None
        results.clear()
        results.update(caller.call(problem, notes))
        return dict(results)

    seed = options.seed or 0
    start, rows = perf_counter(), list[Row]()
    with closing(caller) if caller else nullcontext():
        for dtype in dtypes:
            row = diagnosed(solve, case, dtype, seed) if caller else None
            rows += [row] if row else []
            problem = draw(case, dtype, seed)
            if not options.quiet and options.json != "-":
                print(_details(case, problem, row), flush=True)
            if options.save is not None:
                _save(options.save, problem, results)
        if caller is None:
            return 0
        more = caller.changed_results(rows)
    for row in more if not options.quiet and options.json != "-" else ():
        print(f"{row.case}: {row.message}", flush=True)
    rows += more
    report = Report(options.function, "one case", arrays.name, tuple(rows), perf_counter() - start)
    return _write_json(report, options)


def _details(case: Case, problem: Problem, row: Row | None) -> str:
    """Format one case and, if it was run, its results."""
    mask = case.mask if isinstance(problem.mask, type(None) | np.ndarray) else mask_text(problem)
    lines = [
        f"{case.name}, {problem.dtype}, seed {problem.seed}: {case.reason}",
        f"  {_shapes(case)}, scale {problem.scale:.6g}, memory {case.memory}"
        + (f", before it: {case.calls}" if case.calls else ""),
        f"  mask: {mask}".replace("\n", "\n    "),
    ]
    if row is None:
        return "\n".join(lines)
    lines.append(f"  {row.status}{f': {row.message}' if row.message else ''}")
    if row.verdicts:
        lines.append(f"  {'':5}" + "".join(f"{name:>10}" for name in _COLUMNS))
    for v in row.verdicts:
        numbers = (v.error, v.limit, v.ratio, v.max_abs, v.ulps, v.flash)
        cells = "".join(f"{number:>10.2g}" for number in numbers)
        worst = f"worst at {v.index}: got {v.got:.9g}, expected {v.expected:.9g}"
        lines.append(f"  {v.name:5}{cells}  {worst}{f'  {v.what}' if v.what else ''}")
    if row.diagnosis:
        lines.append(f"  {row.diagnosis}")
    return "\n".join(lines)


def _save(path: str, problem: Problem, results: dict[str, Array]) -> None:
    truth = truth_for(problem.case, problem.dtype, problem.seed)
    arrays = {
        **inputs_of(problem),
        **truth.results,
        **{f"got_{name}": x for name, x in results.items()},
    }
    notes = {
        "case": problem.case.name,
        "reason": problem.case.reason,
        "seed": str(problem.seed),
        "dtype": problem.dtype,
        "scale": repr(problem.scale),
        "mask": mask_text(problem),
        "tensors": "q, k, v, mask, dout: as the function gets them; out, lse, dq, dk, dv: what is "
        "right, in float64; got_...: what the function returned, in float64",
    }
    try:
        write_tensors(path, arrays, notes)
    except OSError as error:
        raise UsageError(f"--save: {path} cannot be written: {error.strerror}") from None


def list_cases() -> int:
    """Print name, group, shapes and reason of the cases of both suites."""
    quick = suite_of("quick")
    more = [case for case in suite_of("full") if case not in quick]
    combined = [case for case in more if case.group == "combinations"]
    for title, cases in (
        ("quick suite, and full", quick),
        (
            "full suite only; NAME.large is that case with more queries and keys",
            [case for case in more if case not in combined],
        ),
        (f"full suite only; {coverage()}", combined),
    ):
        print(f"{title}: {len(cases)} cases")
        rows = [(case.name, case.group, _shapes(case), case.reason) for case in cases]
        widths = [max(len(row[n]) for row in rows) for n in range(3)]
        for *columns, reason in rows:
            cells = (cell.ljust(width) for cell, width in zip(columns, widths, strict=True))
            print("  " + "  ".join(cells) + f"  {reason}")
    print(coverage_of_cuts())
    return 0


def _shapes(case: Case) -> str:
    """Format the shapes of q, k and, if D_V is not D, v."""
    shapes = {
        "q": (case.B, case.H, case.S_Q, case.D),
        "k": (case.B, case.H_KV, case.S_KV, case.D),
        "v": (case.B, case.H_KV, case.S_KV, case.D_V),
    }
    if case.D_V == case.D:
        del shapes["v"]
    return " ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
