"""Run a suite of cases on a function: the front door of the oracle."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lvxattn.check.call_kernel import ComplaintError, call_kernel
from lvxattn.check.cases import Case, suite_of
from lvxattn.check.diagnosis import Suspects
from lvxattn.check.error_location import one_line, raised
from lvxattn.check.frameworks import DTYPES, Framework, framework_of
from lvxattn.check.judge import RESULTS, Truth, Verdict, judge, truth_for
from lvxattn.check.problem import Problem, draw
from lvxattn.check.report import Report, Row
from lvxattn.check.time_limit import EndedError, TimeIsUpError, TimeLimit

Array = npt.NDArray[Any]

_SHOWN = 5  # different reasons for no gradients


def check(
    fn: Callable[..., Any],
    *,
    suite: str = "quick",
    dtypes: Sequence[str] | None = None,
    backward: bool | Callable[..., Any] = True,
    framework: str | None = None,
    device: str | int | None = None,
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
    device : str or int, optional
        Where they are, such as ``"cuda:1"``.
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
    ModuleNotFoundError
        The framework is not installed.
    """
    arrays = framework_of(framework, device)
    check_arguments(fn, suite, backward, seeds, time_limit, cases)
    wanted = wanted_dtypes(dtypes, suite, arrays)
    chosen = [dtype for dtype in wanted if dtype in arrays.dtypes]
    own = backward if callable(backward) else getattr(fn, "backward", None)
    player = Player(fn, arrays, own, backward is not False, TimeLimit(time_limit))
    start, suspects = perf_counter(), Suspects()
    played = suite_of(suite) if cases is None else cases
    try:
        found = [
            judged(player, case, dtype, seed, suspects)
            for case in played
            for dtype in chosen
            for seed in range(seeds)
        ]
    finally:
        player.patience.close()
    rows, probably = suspects.conclude(found, {case.name: case for case in played})
    rows += tuple(ungraded(player, found))
    notes = tuple(notes_of(arrays, rows, wanted, player.patience.abandoned))
    seconds = perf_counter() - start
    return Report(name_of(fn), suite, arrays.name, rows, seconds, notes=notes, probably=probably)


@dataclass(frozen=True)
class Player:
    """A function, and how it is called."""

    fn: Callable[..., Any]
    framework: Framework
    backward: Callable[..., Any] | None
    gradients: bool
    patience: TimeLimit

    def play(self, problem: Problem, notes: list[str] | None = None) -> dict[str, Array]:
        """Call the function; `play.play` says what comes back and what is raised."""
        return self.patience.call(
            lambda: call_kernel(
                self.fn,
                problem,
                self.framework,
                backward=self.backward,
                gradients=self.gradients,
                notes=notes,
            )
        )


class Plays(Protocol):
    """Whoever can solve a problem."""

    def play(self, problem: Problem, notes: list[str] | None = None) -> dict[str, Array]:
        """Return float64 arrays by name, or raise what the function did."""


def judged(
    player: Plays,
    case: Case,
    dtype: str,
    seed: int,
    suspects: Suspects | None = None,
    where: str = "",
) -> Row:
    """Run one case and judge it, and tell `suspects` if it fails."""
    start = perf_counter()
    about: dict[str, Any] = {
        "case": case.name, "group": case.group, "reason": case.reason, "dtype": dtype, "seed": seed
    }  # fmt: skip
    about["where"] = where
    problem = draw(case, dtype, seed)
    notes: list[str] = []
    results, status, message = attempt(lambda: player.play(problem, notes))
    about["note"] = one_line("; ".join(notes))
    if status:
        row = Row(**about, status=status, message=message, seconds=perf_counter() - start)
        if suspects and status == "error":
            suspects.examine(row, problem)
        return row
    truth = truth_for(case, dtype, seed)
    verdicts = verdicts_of(results, problem, truth)
    status = "ok" if all(verdict.passed for verdict in verdicts) else "wrong"
    row = Row(**about, status=status, verdicts=verdicts, seconds=perf_counter() - start)
    if suspects and status == "wrong":
        suspects.examine(row, problem, results, truth)
    return row


def ungraded(player: Player, rows: Sequence[Row]) -> list[Row]:
    """Return a row that fails where autograd could give gradients, and gave none in any case."""
    judged = [row for row in rows if row.verdicts]
    asked = player.gradients and player.backward is None and player.framework.autograd
    given = any(v.name == "dq" for row in judged for v in row.verdicts)
    refused = any("NotImplementedError" in row.note for row in judged)
    if not asked or given or refused or not judged:
        return []
    why = judged[0].note
    message = f"none in any case: {why}; backward=False, --no-backward, if there are to be none"
    about = judged[0]
    return [Row("gradients", "contract", "autograd", about.dtype, 0, "error", message=message)]


def attempt(
    work: Callable[[], dict[str, Array]],
) -> tuple[dict[str, Array], str, str]:
    """Return results, a status that is empty if there are any, and a message of one line."""
    try:
        return work(), "", ""
    except NotImplementedError as error:
        return {}, "unsupported", one_line(error) or "NotImplementedError"
    except (ComplaintError, TimeIsUpError) as error:
        return {}, "error", one_line(error)
    except EndedError as error:
        return {}, "error", raised(error.__cause__ or error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return {}, "error", raised(error)


def verdicts_of(results: dict[str, Array], problem: Problem, truth: Truth) -> tuple[Verdict, ...]:
    """Judge all results that there are."""
    return tuple(
        judge(name, np.asarray(results[name]), problem, truth)
        for name in RESULTS
        if name in results
    )


def name_of(fn: Any) -> str:
    """Return a function's ``module:name``."""
    while not hasattr(fn, "__qualname__") and callable(getattr(fn, "func", None)):
        fn = fn.func  # functools.partial
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    return f"{getattr(fn, '__module__', None) or '?'}:{name}"


def notes_of(
    framework: Framework, rows: Sequence[Row], wanted: Sequence[str], abandoned: int = 0
) -> list[str]:
    """Return what is to be said of the whole check, every thing once.

    Parameters
    ----------
    framework : Framework
    rows : sequence of Row
    wanted : sequence of str
        The dtypes that were asked for.
    abandoned : int
        How many calls could not be ended.
    """
    missing = framework.missing
    notes = [f"{dtype} was left out: {missing[dtype]}" for dtype in wanted if dtype in missing]
    judged = [row for row in rows if row.verdicts]
    count = Counter(row.note for row in judged if row.note)
    for why, n in count.most_common(_SHOWN):
        part = f"no gradients in {n} of {len(judged)}"
        notes.append(f"{'forward only' if n == len(judged) else part}: {why}")
    if len(count) > _SHOWN:
        notes.append(f"and {len(count) - _SHOWN} more reasons for no gradients")
    if judged and not any(v.name == "lse" for row in judged for v in row.verdicts):
        notes.append("no lse was returned, and none judged")
    if abandoned:
        notes.append(
            f"calls that did not come back and could not be ended: {abandoned}, "
            "which may have slowed down what followed"
        )
    return notes


def check_arguments(
    fn: Any, suite: str, backward: Any, seeds: Any, time_limit: Any, cases: Any = None
) -> None:
    """Refuse what `check` cannot work with.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what was given.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a function, got {type(fn).__name__} {fn!r:.40}")
    suite_of(suite)
    if not isinstance(backward, bool) and not callable(backward):
        raise TypeError(f"backward: expected True, False or a function, got {backward!r:.40}")
    own = getattr(fn, "backward", None)
    if backward is True and own is not None and not callable(own):
        raise TypeError(f"fn.backward: expected a function, got {type(own).__name__} {own!r:.40}")
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise ValueError(f"seeds: expected a whole number, at least 1, got {seeds!r:.40}")
    if (
        isinstance(time_limit, bool)
        or not isinstance(time_limit, int | float)
        or not (time_limit > 0)
    ):
        raise ValueError(f"time_limit: expected seconds, more than 0, got {time_limit!r:.40}")
    if isinstance(cases, Case):
        raise TypeError(f"cases: expected a sequence of Case objects, got {cases.name} alone")
    for case in cases or ():
        if not isinstance(case, Case):
            raise TypeError(f"cases: expected Case objects, as of case_of(name), got {case!r:.40}")


def wanted_dtypes(dtypes: Any, suite: str, framework: Framework) -> tuple[str, ...]:
    """Return the dtypes to check, as far as the framework has them.

    Raises
    ------
    TypeError, ValueError
        They are named, and the framework does not have one of them.
    """
    if dtypes is None:
        return tuple(framework.usual if suite == "quick" else DTYPES)
    if isinstance(dtypes, str) or not isinstance(dtypes, Iterable):
        raise TypeError(f"dtypes: expected a sequence of names, got {dtypes!r:.40}")
    known, found = ", ".join(framework.dtypes), tuple(dtypes)
    if not found:
        raise ValueError(f"dtypes: expected at least one of {known}, got none")
    for dtype in found:
        if dtype not in framework.dtypes:
            why = framework.missing.get(str(dtype))
            raise ValueError(
                f"dtypes: expected some of {known} with {framework.name}, got {dtype!r:.40}"
                + (f", which was left out: {why}" if why else "")
            )
    return found
