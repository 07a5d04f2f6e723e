"""The cases that the plugin's options choose, judged or given to tests.

`lvxattn.pytest_plugin` imports this only when a run uses it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from lvxattn.check.call_kernel import call_kernel
from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.cases import DTYPES, Case, suite_of
from lvxattn.check.check_arguments import wanted_dtypes
from lvxattn.check.check_report import Row
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.judge import Truth, Verdict, judge, truth_for
from lvxattn.check.one_call import mismatch
from lvxattn.check.suite import Caller, diagnosed

Array = npt.NDArray[Any]


class Choice(NamedTuple):
    """One problem."""

    case: Case
    dtype: str
    seed: int

    @property
    def id(self) -> str:
        """The id of its test: ``one-query-float32``, ``one-query-float32-seed1``."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.case.name}-{self.dtype}{seed}"


@dataclass(frozen=True)
class Chosen:
    """The choice of the options.

    Attributes
    ----------
    target : str
        The function's name, empty if there is none.
    framework : Framework
    caller : Caller, optional
        Of the function.
    choices : tuple of Choice
    rows : list of Row
        Those judged so far.
    """

    target: str
    framework: Framework
    caller: Caller | None
    choices: tuple[Choice, ...]
    rows: list[Row] = field(default_factory=list)

    def assert_passed(self) -> None:
        """Fail if all cases were skipped, or none gave gradients: skipped is not passed."""
        __tracebackhide__ = True
        assert self.caller is not None
        if not self.rows:
            pytest.skip("no case was run")
        if all(row.status == "unsupported" for row in self.rows):
            pytest.fail(f"nothing was judged: {len(self.rows)} unsupported", pytrace=False)
        for row in self.caller.afterwards(self.rows):
            pytest.fail(f"{row.case}: {row.message}", pytrace=False)


def chosen_by(options: dict[str, Any]) -> Chosen:
    """Validate the options, and import the function.

    Parameters
    ----------
    options : dict
        Values of impl, backward, suite, dtypes, framework, device and seeds, or None.

    Raises
    ------
    ValueError
        An option is invalid; the message names it.
    """
    suite, names = options["suite"] or "quick", options["dtypes"]
    try:
        framework = framework_of(options["framework"], options["device"])
        cases = suite_of(suite)
        names = None if names is None else [name.strip() for name in names.split(",")]
        dtypes = wanted_dtypes(names, suite, framework)
    except ValueError as error:
        raise ValueError(f"--lvx-{error}") from None  # it begins with the argument's name
    except ImportError as error:
        raise ValueError(f"--lvx-framework: {options['framework']}: {error}") from None
    seeds = options["seeds"] or "1"
    if not seeds.isdecimal() or int(seeds) < 1:
        raise ValueError(f"--lvx-seeds: expected a whole number from 1 up, got {seeds!r}")
    framework.chosen = tuple(dtype for dtype in dtypes if dtype in framework.dtypes)
    caller = None
    if options["impl"] is not None:
        try:
            caller = Caller(options["impl"], framework, options["backward"] or True, 30.0)
        except ValueError as error:
            name, _, what = str(error).partition(":")
            raise ValueError(f"--lvx-{'impl' if name == 'fn' else name}:{what}") from None
    elif options["backward"] is not None:
        raise ValueError("--lvx-backward: goes with --lvx-impl")
    choices = (Choice(c, d, s) for c in cases for d in framework.chosen for s in range(int(seeds)))
    return Chosen(options["impl"] or "", framework, caller, tuple(choices))


def possible_ids() -> Iterator[str]:
    """Yield the ids of all cases in all dtypes, seed 0."""
    for case in suite_of("full"):
        yield from (Choice(case, dtype, 0).id for dtype in DTYPES)


@dataclass(frozen=True)
class JudgedCase:
    """One problem for the function of the options."""

    chosen: Chosen
    choice: Choice

    def assert_passed(self) -> None:
        """Pass, skip or fail as the case does."""
        __tracebackhide__ = True
        assert self.chosen.caller is not None
        row = diagnosed(self.chosen.caller.call, *self.choice)
        self.chosen.rows.append(row)
        if row.status == "unsupported":
            pytest.skip(f"unsupported: {row.message}" if row.message else "unsupported")
        if row.status != "ok":
            pytest.fail(self._text(row), pytrace=False)

    def _text(self, row: Row) -> str:
        """Format the row's failure, and the command that reproduces it."""
        again = f"--case {row.case} --seed {row.seed} --dtypes {row.dtype}"
        if self.chosen.framework.name != "numpy":
            again += f" --framework {self.chosen.framework.name}"
        lines = [
            f"{self.choice.id}: {row.reason}",
            row.message,
            *(_wrong(verdict) for verdict in row.verdicts if not verdict.passed),
            row.diagnosis,
            f"again: python -m lvxattn.check {self.chosen.target} {again}",
        ]
        return "\n  ".join(line for line in lines if line)


@dataclass(frozen=True)
class XattnCase:
    """One problem for a test of the user.

    Attributes
    ----------
    case : Case
        Its name, reason and sizes.
    dtype : str
    seed : int
    q : (B, H, S_Q, D)
    k : (B, H_KV, S_KV, D)
    v : (B, H_KV, S_KV, D_V)
    dout : (B, H, S_Q, D_V)
        In the framework of the options, by default NumPy.
    scale : float
    mask : None, bool or additive array, or callable
    truth : dict
        out, lse, dq, dk, dv in NumPy's float64.
    """

    case: Case
    dtype: str
    seed: int
    q: Any
    k: Any
    v: Any
    dout: Any
    scale: float
    mask: Any
    truth: dict[str, Array]
    _framework: Framework
    _problem: Problem
    _limits: Truth

    def check(self, **results: Any) -> None:
        """Judge results.

        Parameters
        ----------
        **results
            Any of out, lse, dq, dk and dv.

        Raises
        ------
        AssertionError
            One exceeds its limit, or is not an array of the expected kind, shape and dtype.
        TypeError
            No result is given, or one of another name.
        """
        __tracebackhide__ = True
        names = ", ".join(self.truth)
        if not results:
            raise TypeError(f"check: expected some of {names}, got nothing")
        for name in results:
            if name not in self.truth:
                raise TypeError(f"check: expected some of {names}, got {name!r}")
        wrong = [text for name, x in results.items() if (text := self._wrong(name, x))]
        if wrong:
            name = Choice(self.case, self.dtype, self.seed).id
            raise AssertionError("\n  ".join([f"{name}: {self.case.reason}", *wrong]))

    def _wrong(self, name: str, x: Any) -> str:
        """Return what is wrong with one result; empty if it is correct."""
        if not self._framework.owns(x):
            return f"{name}: expected an array of {self._framework.name}, got {type(x).__name__}"
        text = mismatch(name, x, self.truth[name].shape, self.dtype)
        if text:
            return text
        verdict = judge(name, self._framework.get(x), self._problem, self._limits)
        return "" if verdict.passed else _wrong(verdict)


def _wrong(verdict: Verdict) -> str:
    """Format a wrong result in one line."""
    far = f"relative error {verdict.error:.1e}, limit {verdict.limit:.1e}; worst"
    what = f"{verdict.what};" if verdict.what else far
    return (
        f"{verdict.name}: {what} at {verdict.index} got {verdict.got:.6g}, "
        f"expected {verdict.expected:.6g}"
    )


def xattn_case_of(chosen: Chosen, choice: Choice) -> XattnCase:
    """Draw the arrays of a choice."""
    problem = draw(*choice)
    truth, given = truth_for(*choice), _given(problem, chosen.framework)
    return XattnCase(
        *choice,
        **given,
        truth=truth.results,
        _framework=chosen.framework,
        _problem=problem,
        _limits=truth,
    )


def _given(problem: Problem, framework: Framework) -> dict[str, Any]:
    """Return the arguments that a function gets."""
    given: dict[str, Any] = {}

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        given.update(q=q, k=k, v=v, scale=scale, mask=mask)
        return framework.put(np.zeros(problem.dout.shape, problem.dout.dtype))

    def backward(dout: Any, *_: Any, **__: Any) -> Any:
        given["dout"] = dout
        raise NotImplementedError

    problem = replace(problem, case=replace(problem.case, calls=""))
    call_kernel(fn, problem, framework, backward=backward, gradients=True)
    return given
