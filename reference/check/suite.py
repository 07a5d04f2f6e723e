"""Run a suite of cases on a function: the front door of the oracle."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.reference.check.cases import Case, suite_of
from lvxattn.reference.check.diagnosis import Suspects
from lvxattn.reference.check.frameworks import Framework, framework_of
from lvxattn.reference.check.judge import RESULTS, Truth, Verdict, judge, truth_of
from lvxattn.reference.check.patience import Patience, TimeIsUpError
from lvxattn.reference.check.play import ComplaintError, play
from lvxattn.reference.check.problem import Problem, draw
from lvxattn.reference.check.report import Report, Row

Array = npt.NDArray[Any]


def check(
    fn: Callable[..., Any],
    *,
    suite: str = "quick",
    dtypes: Sequence[str] | None = None,
    backward: bool | Callable[..., Any] = True,
    framework: str | None = None,
    device: str | None = None,
    seeds: int = 1,
    time_limit: float = 30.0,
    cases: Sequence[Case] | None = None,
) -> Report:
    """Hold an attention function against the reference, on the cases that break such functions.

    Not collective.

    Parameters
    ----------
    fn : callable
        ``fn(q, k, v, *, scale, mask) -> out`` or ``(out, lse)``: q (B, H, S_Q, D),
        k (B, H_KV, S_KV, D), v (B, H_KV, S_KV, D_V); scale a float; mask None, a bool array
        (True = may attend), an additive array of q's dtype, or a callable
        ``mask(b, h, q_index, kv_index) -> bool``; out (B, H, S_Q, D_V) of q's dtype; lse
        (B, H, S_Q), natural, of the accumulator dtype.  It raises NotImplementedError for what it
        does not do.
    suite : str
        ``"quick"`` or ``"full"``.
    dtypes : sequence of str, optional
        Of ``"float64"``, ``"float32"``, ``"float16"`` and ``"bfloat16"``.  Unless given, the quick
        suite takes the framework's usual ones and the full suite all that it has.
    backward : bool or callable
        Whether to check gradients: by ``fn.backward(dout, q, k, v, out, lse, *, scale, mask) ->
        (dq, dk, dv)``, or this function of the same arguments, or else by autograd.
    framework : str, optional
        Whose arrays fn gets: ``"numpy"``, unless given, ``"torch"``, ``"jax"`` or ``"cupy"``.
    device : str, optional
        Where they are, such as ``"cuda"``.
    seeds : int
        How many problems of each case.
    time_limit : float
        Seconds that a case may take.
    cases : sequence of Case, optional
        Instead of the suite's.

    Returns
    -------
    Report

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what was given; what fn does wrong is in the
        report instead.
    """
    arrays = framework_of(framework, device)
    chosen = _check_arguments(fn, suite, dtypes, backward, arrays, seeds, time_limit)
    own = backward if callable(backward) else getattr(fn, "backward", None)
    player = Player(fn, arrays, own, backward is not False, Patience(time_limit))
    start, suspects = perf_counter(), Suspects()
    played = suite_of(suite) if cases is None else cases
    judged_rows = [
        judged(player, case, dtype, seed, suspects)
        for case in played
        for dtype in chosen
        for seed in range(seeds)
    ]
    player.patience.close()
    rows, probably = suspects.conclude(judged_rows, {case.name: case for case in played})
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    target = f"{getattr(fn, '__module__', '?')}:{name}"
    seconds = perf_counter() - start
    return Report(target, suite, arrays.name, rows, seconds, probably=probably)


@dataclass(frozen=True)
class Player:
    """A function, and how it is called."""

    fn: Callable[..., Any]
    framework: Framework
    backward: Callable[..., Any] | None
    gradients: bool
    patience: Patience

    def play(self, problem: Problem) -> dict[str, Array]:
        """Call the function; `play.play` says what comes back and what is raised."""
        return self.patience.call(
            lambda: play(
                self.fn, problem, self.framework, backward=self.backward, gradients=self.gradients
            )
        )


def judged(
    player: Player, case: Case, dtype: str, seed: int, suspects: Suspects | None = None
) -> Row:
    """Run one case and judge it, and tell `suspects` if it fails."""
    start = perf_counter()
    about: dict[str, Any] = {
        "case": case.name, "group": case.group, "reason": case.reason, "dtype": dtype, "seed": seed
    }  # fmt: skip
    problem = draw(case, dtype, seed)
    results, status, message = attempt(lambda: player.play(problem))
    if status:
        row = Row(**about, status=status, message=message, seconds=perf_counter() - start)
        if suspects and status == "error":
            suspects.examine(row, problem)
        return row
    truth = truth_of(problem)
    verdicts = verdicts_of(results, problem, truth)
    status = "ok" if all(verdict.passed for verdict in verdicts) else "wrong"
    row = Row(**about, status=status, verdicts=verdicts, seconds=perf_counter() - start)
    if suspects and status == "wrong":
        suspects.examine(row, problem, results, truth)
    return row


def attempt(
    work: Callable[[], dict[str, Array]],
) -> tuple[dict[str, Array], str, str]:
    """Return results, a status that is empty if there are any, and a message."""
    try:
        return work(), "", ""
    except KeyboardInterrupt:
        raise
    except NotImplementedError as error:
        return {}, "unsupported", str(error)
    except (ComplaintError, TimeIsUpError) as error:
        return {}, "error", str(error)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        return {}, "error", f"{type(error).__name__}: {text:.300} ({last.filename}:{last.lineno})"


def verdicts_of(results: dict[str, Array], problem: Problem, truth: Truth) -> tuple[Verdict, ...]:
    """Judge all results that there are."""
    return tuple(
        judge(name, np.asarray(results[name]), problem, truth)
        for name in RESULTS
        if name in results
    )


def _check_arguments(
    fn: Any,
    suite: str,
    dtypes: Sequence[str] | None,
    backward: Any,
    framework: Framework,
    seeds: int,
    time_limit: float,
) -> tuple[str, ...]:
    """Return the dtypes to check."""
    if not callable(fn):
        raise TypeError(f"fn: expected a function, got {type(fn).__name__} {fn!r:.40}")
    suite_of(suite)
    if not isinstance(backward, bool) and not callable(backward):
        raise TypeError(f"backward: expected True, False or a function, got {backward!r:.40}")
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if not time_limit > 0:
        raise ValueError(f"time_limit: expected a number of seconds above 0, got {time_limit}")
    if dtypes is None:
        return framework.usual if suite == "quick" else framework.dtypes
    if isinstance(dtypes, str):
        raise TypeError(f"dtypes: expected a sequence of names, got the string {dtypes!r}")
    for dtype in dtypes:
        if dtype not in framework.dtypes:
            known = ", ".join(framework.dtypes)
            raise ValueError(
                f"dtypes: expected some of {known} with {framework.name}, got {dtype!r}"
            )
    return tuple(dtypes)
