"""Run a suite of cases on a function: the entry point of the oracle."""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy.typing as npt

from lvxattn.check.callers import process_of
from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.cases import Case, suite_of
from lvxattn.check.check_arguments import check_arguments, wanted_dtypes
from lvxattn.check.check_notes import notes_of
from lvxattn.check.check_report import Report, Row
from lvxattn.check.dependence import condition, described, simpler_cases, smallest
from lvxattn.check.diagnosis import Suspects
from lvxattn.check.error_location import failure_of, one_line, refuses_value_size
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.import_target import name_of
from lvxattn.check.judge import RESULTS, Verdict, judge, truth_for

Array = npt.NDArray[Any]
# Calls the function on a problem and returns float64 arrays by name; appends to notes why there are
# no gradients.
Solve = Callable[[Problem, list[str]], dict[str, Array]]


def check(
    fn: Callable[..., Any] | str,
    *,
    suite: str = "quick",
    dtypes: Sequence[str] | None = None,
    backward: bool | Callable[..., Any] | str = True,
    framework: str | None = None,
    device: str | int | None = None,
    seeds: int = 1,
    time_limit: float = 30.0,
    cases: Sequence[Case] | None = None,
) -> Report:
    """Check an attention function against the reference, on the cases that break such functions.

    Not collective.  A function that its module has under its name is imported and called in a
    process of its own; others, such as a notebook's, are called in this one.

    Parameters
    ----------
    fn : callable or str
        ``fn(q, k, v, *, scale, mask) -> out`` or ``(out, lse)``: q (B, H, S_Q, D),
        k (B, H_KV, S_KV, D), v (B, H_KV, S_KV, D_V); scale a float; mask None, a bool array
        (True = may attend), an additive array of q's dtype, or a callable
        ``mask(b, h, q_index, kv_index) -> bool``; out (B, H, S_Q, D_V) of q's dtype; lse
        (B, H, S_Q), natural, of the accumulator dtype.  It raises NotImplementedError for
        unsupported problems.  Or its name, ``"package.module:function"``.
    suite : str
        ``"quick"`` or ``"full"``.
    dtypes : sequence of str, optional
        Of ``"float64"``, ``"float32"``, ``"float16"`` and ``"bfloat16"``.  Default: the framework's
        usual ones in the quick suite, all available ones in the full suite.
    backward : bool, callable or str
        Whether to check gradients: by ``fn.backward(dout, q, k, v, out, lse, *, scale, mask) ->
        (dq, dk, dv)``, or this function of the same arguments, or else by autograd.
    framework : str, optional
        The array library of fn: ``"numpy"`` (default), ``"torch"``, ``"jax"`` or ``"cupy"``.
    device : str or int, optional
        Where the arrays are, such as ``"cuda:1"``.
    seeds : int
        Number of problems of each case.
    time_limit : float
        Seconds per case.
    cases : sequence of Case, optional
        Cases to run instead of a suite.

    Returns
    -------
    Report

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what was given.  Errors of fn are part of the
        report instead.
    ModuleNotFoundError
        The framework is not installed.

    Examples
    --------
    >>> from lvxattn.check import case_of, check
    >>> from lvxattn.reference import full_attention
    >>> report = check(full_attention, cases=[case_of("one-key")], dtypes=["float64"])
    >>> report
    <Report of lvxattn.reference.full_attention:full_attention: 1 of 1 passed>
    >>> [verdict.name for verdict in report.rows[0].verdicts]
    ['out', 'lse']
    """
    arrays = framework_of(framework, device)
    check_arguments(fn, suite, backward, seeds, time_limit, cases)
    wanted = wanted_dtypes(dtypes, suite, arrays)
    arrays.chosen = tuple(dtype for dtype in wanted if dtype in arrays.dtypes)
    caller = Caller(fn, arrays, backward, time_limit)
    start, suspects = perf_counter(), Suspects()
    chosen = suite_of(suite) if cases is None else cases
    try:
        found = [
            judged(caller.call, case, dtype, seed, suspects)
            for case in chosen
            for dtype in arrays.chosen
            for seed in range(seeds)
        ]
        more = caller.afterwards(found)
        by_name = {case.name: case for case in chosen}
        depends = _depends(caller.call, found, by_name)
    finally:
        caller.close()
    rows, probably = suspects.conclude(found, by_name)
    rows += tuple(more)
    notes = (*depends, *notes_of(arrays, rows, wanted, caller.abandoned, caller.ending))
    seconds = perf_counter() - start
    target = fn if isinstance(fn, str) else name_of(fn)
    return Report(target, suite, arrays.name, rows, seconds, notes=notes, probably=probably)


class Caller:
    """A function and its options, called with a time limit.

    Parameters
    ----------
    fn : callable or str
    framework : Framework
    backward : bool, callable or str
        As `check` takes it.
    time_limit : float
        Seconds per call.

    Raises
    ------
    ValueError
        A text names no function; begins with ``fn: `` or ``backward: ``.
    """

    def __init__(self, fn: Any, framework: Framework, backward: Any, time_limit: float) -> None:
        self.framework, self.gradients = framework, backward is not False
        self._process = process_of(fn, framework, backward, time_limit)
        self.call, self.close = self._process.call, self._process.close

    @property
    def abandoned(self) -> int:
        """Number of calls that could not be ended."""
        return self._process.abandoned

    @property
    def ending(self) -> str:
        """How the function's process has ended, once closed, if not as it should."""
        return self._process.ending

    def afterwards(self, rows: Sequence[Row]) -> list[Row]:
        """Return failing rows of what shows only after all calls, given the rows of these."""
        return self._missing_gradients(rows) + self.changed_results(rows)

    def changed_results(self, rows: Sequence[Row]) -> list[Row]:
        """Return a failing row if results were changed after the last call."""
        message = ""
        try:
            self._process.look_back()
        except Exception as error:
            _, message = failure_of(error)
        return [_contract_row("results", "memory", rows[-1].dtype, message)] if message else []

    def _missing_gradients(self, rows: Sequence[Row]) -> list[Row]:
        """Return a failing row if autograd should have given gradients, and gave none at all."""
        judged = [row for row in rows if row.verdicts]
        expected = self.gradients and not self._process.own_backward and self.framework.autograd
        given = any(v.name == "dq" for row in judged for v in row.verdicts)
        # Refused, or the backward raised.
        told = any("NotImplementedError" in row.note or row.message for row in judged)
        if not expected or given or told or not judged:
            return []
        first = judged[0]
        hint = "backward=False, --no-backward, if there are to be none"
        message = f"none in any case: {first.note}; {hint}"
        return [_contract_row("gradients", "autograd", first.dtype, message)]


def _contract_row(name: str, reason: str, dtype: str, message: str) -> Row:
    return Row(name, "contract", reason, dtype, 0, "error", message=message)


def judged(
    solve: Solve,
    case: Case,
    dtype: str,
    seed: int,
    suspects: Suspects | None = None,
    where: str = "",
) -> Row:
    """Run one case and judge it; record a failure in `suspects`."""
    start = perf_counter()
    about: dict[str, Any] = {
        "case": case.name, "group": case.group, "reason": case.reason, "dtype": dtype,
        "seed": seed, "where": where,
    }  # fmt: skip
    problem = draw(case, dtype, seed)
    notes: list[str] = []
    results, status, message = attempt(lambda: solve(problem, notes))
    if status == "error" and case.D_V != case.D and refuses_value_size(message):
        status = "unsupported"
    about |= {"note": one_line("; ".join(notes)), "message": message}
    verdicts: tuple[Verdict, ...] = ()
    if results:  # also of the forward alone, if the backward failed
        truth = truth_for(case, dtype, seed)
        verdicts = tuple(judge(x, results[x], problem, truth) for x in RESULTS if x in results)
        right = all(verdict.passed for verdict in verdicts)
        status = (status or "ok") if right else "wrong"
    row = Row(**about, status=status, verdicts=verdicts, seconds=perf_counter() - start)
    if suspects and status == "error":
        suspects.examine(row, problem)
    elif suspects and status == "wrong":
        suspects.examine(row, problem, results, truth)
    return row


def _depends(solve: Solve, rows: Sequence[Row], cases: Mapping[str, Case]) -> list[str]:
    """Return what wrong results depend on, and the smallest problem that has one."""
    wrong = [row for row in rows if row.status == "wrong"]
    if not wrong:
        return []
    first = min(wrong, key=lambda row: size_of(cases[row.case]))

    def fails(case: Case) -> bool:
        try:
            draw(case, first.dtype, first.seed)
        except ValueError:  # its mask needs more queries
            return False
        return judged(solve, case, first.dtype, first.seed).status == "wrong"

    found, more = smallest(cases[first.case], fails, simpler_cases)
    tried = [(cases[r.case], r.dtype, r.status == "wrong") for r in rows if r.verdicts]
    tried += [(case, first.dtype, failed) for case, failed in more.items()]
    least = f"smallest that fails, from {first.case} in {first.dtype}: {described(found)}"
    return [text for text in (condition(tried), least) if text]


def size_of(case: Case) -> int:
    """Return a measure of a case's size."""
    return case.B * case.H * case.S_Q * case.S_KV * (case.D + case.D_V)


def diagnosed(solve: Solve, case: Case, dtype: str, seed: int) -> Row:
    """Run one case, judge it, and diagnose a failure."""
    suspects = Suspects()
    row = judged(solve, case, dtype, seed, suspects)
    (row,), _ = suspects.conclude([row], {case.name: case})
    return row


def attempt(work: Callable[[], dict[str, Array]]) -> tuple[dict[str, Array], str, str]:
    """Call work; return its results, a status, empty on success, and a one-line message."""
    try:
        return work(), "", ""
    except BaseException as error:
        return getattr(error, "results", {}), *failure_of(error)
