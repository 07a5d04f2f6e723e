"""Call the function to be checked, as often and in the order that a case prescribes.

    fn(q, k, v, *, scale, mask) -> out  or  (out, lse)
    fn.backward(dout, q, k, v, out, lse, *, scale, mask) -> (dq, dk, dv)

Without a backward of its own, it is differentiated by autograd where the framework has that.  The
backward's lse is None if the function returns none.
"""

from collections.abc import Callable, Collection
from functools import partial
from math import inf
from operator import call
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.frameworks import Framework
from lvxattn.check.one_call import Call, Kept, Together

Array = npt.NDArray[Any]

# As many calls as show what happens once in 500, unless that takes too long.
_REPEATS, _REPEATS_OF_BACKWARD, _REPEAT_SECONDS = 1500, 500, 3.0
_REPEATS_ON_RANKS = 20  # a number: a limit of time would end the calls on some ranks only


def call_kernel(
    fn: Callable[..., Any],
    problem: Problem,
    framework: Framework,
    *,
    backward: Callable[..., Any] | None,
    gradients: bool,
    notes: list[str] | None = None,
    part: Callable[[Problem], Problem] = lambda problem: problem,
    together: Together = call,
    on_ranks: bool = False,
    last: "LastResults | None" = None,
) -> dict[str, Array]:
    """Call fn on a problem, after the earlier calls that its case prescribes.

    Parameters
    ----------
    fn : callable
    problem : Problem
    framework : Framework
    backward : callable, optional
        fn's; default: autograd.
    gradients : bool
        Whether to compute gradients.
    notes : list of str, optional
        Receives the reason if there are no gradients.
    part : callable
        Returns this rank's part of a problem.
    together : callable
        Calls a function of no arguments, and raises on every rank if it raised on one: otherwise
        only some ranks would go on to the next call.
    on_ranks : bool
        Whether other ranks call fn too, and must be called equally often.
    last : LastResults, optional
        Those of the call before, which are compared with what they were, and replaced by these.

    Returns
    -------
    dict
        float64 arrays by name: out, and lse, dq, dk, dv as far as there are any.

    Raises
    ------
    ContractError
        A result has the wrong kind, shape or dtype, or the function modified an argument or a
        result that it had returned.
    NotImplementedError
        fn does not support this problem.
    BackwardError
        Only the backward failed.
    Exception
        Any error of fn.
    """
    calls = problem.case.calls
    before: list[Problem] = []
    if calls == "other dtype":
        dtypes = framework.chosen or framework.dtypes
        others = [dtype for dtype in dtypes if dtype != problem.dtype]
        before = [draw(problem.case, dtype, problem.seed + 1) for dtype in others[:1]]
    elif calls in ("other data", "in between"):
        before = [draw(problem.case, problem.dtype, problem.seed + 1)]

    earlier: list[Kept] = []

    def call_once(
        problem: Problem, gradients: bool, notes: list[str] | None, between: Callable[[], Any]
    ) -> Kept:
        each = Call(part(problem), fn, backward, gradients, framework, on_ranks)
        return each.forward_and_backward(together, notes, between)

    def nothing() -> None: ...

    def call_others() -> None:
        for other in before:
            try:
                earlier.append(
                    call_once(other, gradients and calls != "other dtype", None, nothing)
                )
            except NotImplementedError:
                if calls != "other dtype":
                    raise  # then the judged problem is unsupported, too

    with framework.active():
        if calls != "in between":
            call_others()
        between = call_others if calls == "in between" else nothing
        results = call_once(problem, gradients, notes, between)
        for kept in earlier:
            kept.assert_unchanged("was changed by the next call: its memory is used again")
        judged = results.copies
        # Our own kernels say whether their calls can differ.
        if calls == "repeated" and getattr(fn, "differs", True):

            def repeats(most: int, gradients: bool) -> list[dict[str, Array]]:
                most = min(most, _REPEATS_ON_RANKS) if on_ranks else most
                seconds = inf if on_ranks else _REPEAT_SECONDS
                work = partial(call_once, problem, gradients, None, nothing)
                return [judged, *_repeats(work, most, seconds)]

            again = repeats(_REPEATS, False)
            if gradients and "dq" in judged:
                both = repeats(_REPEATS_OF_BACKWARD, True)
                again += both
                judged = {**judged, **_farthest(both, judged.keys() - {"out", "lse"})}
            judged = {**judged, **_farthest(again, judged.keys() & {"out", "lse"})}
        if last is not None:
            last.look_back()
            last.keep(problem, results)
    return judged


def _repeats(work: Callable[[], Kept], most: int, seconds: float) -> list[dict[str, Array]]:
    """Return the results of the same call again and again."""
    start, found = perf_counter(), list[dict[str, Array]]()
    while len(found) < most and perf_counter() - start < seconds:
        found.append(work().copies)
    return found


@np.errstate(invalid="ignore")
def _farthest(found: list[dict[str, Array]], names: Collection[str]) -> dict[str, Array]:
    """Return some results of the call that is farthest from most."""
    distance = np.zeros(len(found))
    for name in names:
        every = np.stack([results[name] for results in found])
        usual = np.sort(every, axis=0)[len(found) // 2]  # the median, NaN only if most are
        same = (every == usual) | (np.isnan(every) & np.isnan(usual))
        apart = np.where(same, 0.0, np.nan_to_num(abs(every - usual), nan=np.inf))
        distance = np.maximum(distance, apart.reshape(len(found), -1).max(axis=1, initial=0.0))
    worst = found[int(np.argmax(distance))]
    return {name: worst[name] for name in names}


class LastResults:
    """The results of a call, kept to see whether the function changes them later."""

    def __init__(self) -> None:
        self._kept: tuple[str, Kept] | None = None

    def keep(self, problem: Problem, results: "Kept") -> None:
        """Keep results instead of earlier ones."""
        self._kept = f"{problem.case.name}, {problem.dtype}, seed {problem.seed}", results

    def look_back(self) -> None:
        """Raise a ContractError if the results have changed, and forget them.

        Called where the framework is active.
        """
        if self._kept is not None:
            (where, kept), self._kept = self._kept, None
            kept.assert_unchanged(f"the result for {where} was changed after it was returned")


def backward_of(fn: Any, backward: Any) -> Callable[..., Any] | None:
    """Return the function's own backward, if any; `backward` as `check` takes it.

    Raises
    ------
    TypeError
        fn.backward is no function.
    """
    if backward is not True:
        return backward if callable(backward) else None
    own: Callable[..., Any] | None = getattr(fn, "backward", None)
    if own is not None and not callable(own):
        raise TypeError(f"fn.backward: expected a function, got {type(own).__name__} {own!r:.40}")
    return own
