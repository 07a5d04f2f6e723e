"""What the plugin works with: the cases that the options choose, judged or handed out.

`lvxattn.pytest_plugin` imports this when a run uses it, and never otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from lvxattn.check.call_kernel import call_kernel
from lvxattn.check.cases import Case, suite_of
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.import_target import load
from lvxattn.check.judge import Truth, judge, truth_for
from lvxattn.check.problem import Problem, draw
from lvxattn.check.report import Row
from lvxattn.check.single import diagnosed, wrong_in
from lvxattn.check.suite import Player, ungraded
from lvxattn.check.time_limit import TimeLimit
from lvxattn.common.validation import FLOATING, accumulator, dtype_name

Array = npt.NDArray[Any]


class Choice(NamedTuple):
    """One problem."""

    case: Case
    dtype: str
    seed: int

    @property
    def id(self) -> str:
        """As tests are called: ``one-query-float32``, ``one-query-float32-seed1``."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.case.name}-{self.dtype}{seed}"


@dataclass(frozen=True)
class Chosen:
    """What the options choose.

    Attributes
    ----------
    target : str
        The function's name, empty if there is none.
    framework : Framework
    player : Player, optional
        The function.
    choices : tuple of Choice
    rows : list of Row
        What has come of them so far.
    """

    target: str
    framework: Framework
    player: Player | None
    choices: tuple[Choice, ...]
    rows: list[Row] = field(default_factory=list)

    def hold(self) -> None:
        """Fail if all cases were skipped, or none gave gradients: skipped is not passed."""
        __tracebackhide__ = True
        assert self.player is not None
        if not self.rows:
            pytest.skip("no case was run")
        if all(row.status == "unsupported" for row in self.rows):
            pytest.fail(f"nothing was judged: {len(self.rows)} unsupported", pytrace=False)
        for row in ungraded(self.player, self.rows):
            pytest.fail(f"gradients: {row.message}", pytrace=False)


def chosen_by(options: dict[str, Any]) -> Chosen:
    """Look at the options, and import the function.

    Parameters
    ----------
    options : dict
        impl, backward, suite, dtypes, framework, device, seeds: what was given, or None.

    Raises
    ------
    ValueError
        One cannot be; the text names it.
    """
    try:
        framework = framework_of(options["framework"], options["device"])
        cases = suite_of(options["suite"] or "quick")
    except ValueError as error:
        raise ValueError(f"--lvx-{error}") from None  # it begins with the argument's name
    except ImportError as error:
        raise ValueError(f"--lvx-framework: {options['framework']}: {error}") from None
    if options["dtypes"] is None:
        quick = (options["suite"] or "quick") == "quick"
        names = [name for name in framework.dtypes if not quick or name in framework.usual]
    else:
        names = [name.strip() for name in options["dtypes"].split(",")]
    for name in names:
        if name not in framework.dtypes:
            known = ", ".join(framework.dtypes)
            raise ValueError(
                f"--lvx-dtypes: expected some of {known} with {framework.name} here, got {name!r}"
            )
    seeds = options["seeds"] or "1"
    if not seeds.isdecimal() or int(seeds) < 1:
        raise ValueError(f"--lvx-seeds: expected a whole number from 1 up, got {seeds!r}")
    player = None
    if options["impl"] is not None:
        fn = load(options["impl"], "--lvx-impl")
        backward = getattr(fn, "backward", None)
        if options["backward"] is not None:
            backward = load(options["backward"], "--lvx-backward")
        player = Player(fn, framework, backward, True, TimeLimit(30.0))
    elif options["backward"] is not None:
        raise ValueError("--lvx-backward: goes with --lvx-impl")
    choices = (Choice(c, d, s) for c in cases for d in names for s in range(int(seeds)))
    return Chosen(options["impl"] or "", framework, player, tuple(choices))


def possible_ids() -> Iterator[str]:
    """Yield the ids of all cases in all dtypes, seed 0."""
    for case in suite_of("full"):
        yield from (Choice(case, dtype, 0).id for dtype in FLOATING)


@dataclass(frozen=True)
class JudgedCase:
    """One problem, for the function of the options."""

    chosen: Chosen
    choice: Choice

    def hold(self) -> None:
        """Let pytest know what comes of it: nothing, a skip or a failure."""
        __tracebackhide__ = True
        assert self.chosen.player is not None
        row = diagnosed(self.chosen.player, *self.choice)
        self.chosen.rows.append(row)
        if row.status == "unsupported":
            pytest.skip(f"unsupported: {row.message}" if row.message else "unsupported")
        if row.status != "ok":
            pytest.fail(self._text(row), pytrace=False)

    def _text(self, row: Row) -> str:
        """Return what the report says of the row, and how to see it again."""
        again = f"--case {row.case} --seed {row.seed} --dtypes {row.dtype}"
        if self.chosen.framework.name != "numpy":
            again += f" --framework {self.chosen.framework.name}"
        lines = [
            f"{self.choice.id}: {row.reason}",
            row.message,
            *(wrong_in(verdict) for verdict in row.verdicts if not verdict.passed),
            row.diagnosis,
            f"again: python -m lvxattn.check {self.chosen.target} {again}",
        ]
        return "\n  ".join(line for line in lines if line)


@dataclass(frozen=True)
class XattnCase:
    """One problem for a test of one's own.

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
        In the framework of the options, NumPy unless given.
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
        """Hold results against the truth.

        Parameters
        ----------
        **results
            out, lse, dq, dk, dv, as many as there are.

        Raises
        ------
        AssertionError
            One is not within its limit, or is no array of the right kind, shape and dtype.
        TypeError
            None is given, or one of another name.
        """
        __tracebackhide__ = True
        names = ", ".join(self.truth)
        if not results:
            raise TypeError(f"check: expected some of {names}, got nothing")
        for name in results:
            if name not in self.truth:
                raise TypeError(f"check: expected some of {names}, got {name!r}")
        complaints = [self._complaint(name, x) for name, x in results.items()]
        complaints = [text for text in complaints if text]
        if complaints:
            name = Choice(self.case, self.dtype, self.seed).id
            start = f"{name}: {self.case.reason}"
            raise AssertionError("\n  ".join([start, *complaints]))

    def _complaint(self, name: str, x: Any) -> str:
        """Say what is wrong with one result."""
        if not self._framework.owns(x):
            return f"{name}: expected an array of {self._framework.name}, got {type(x).__name__}"
        want = self.truth[name]
        if tuple(x.shape) != want.shape:
            return f"{name}: expected shape {want.shape}, got {tuple(x.shape)}"
        dtypes = [self.dtype]
        if name == "lse":
            dtypes = list(dict.fromkeys((accumulator(self.dtype), "float64")))
        if dtype_name(x) not in dtypes:
            return f"{name}: expected dtype {' or '.join(dtypes)}, got {dtype_name(x)}"
        verdict = judge(name, self._framework.get(x), self._problem, self._limits)
        return "" if verdict.passed else wrong_in(verdict)


def xattn_case_of(chosen: Chosen, choice: Choice) -> XattnCase:
    """Make the arrays of a choice."""
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
    """Return the arguments that a function would get."""
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
