"""Calling the function that is checked, and holding it to its word.

    fn(q, k, v, *, scale, mask) -> out  or  (out, lse)
    fn.backward(dout, q, k, v, out, lse, *, scale, mask) -> (dq, dk, dv)

Without a backward of its own, autograd differentiates it where the framework has that.  lse is None
for a backward whose function returns none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lvxattn.check.frameworks import Framework
from lvxattn.check.problem import Problem, draw
from lvxattn.common.validation import accumulator, dtype_name, library

Array = npt.NDArray[Any]
T = TypeVar("T")


class ComplaintError(Exception):
    """The function did not keep to its contract."""


def whole(problem: Problem) -> Problem:
    """Return the problem: what a function gets that is not distributed."""
    return problem


def alone(work: Callable[[], T]) -> T:
    """Do the work: nobody else has to know how it ended."""
    return work()


def call_kernel(
    fn: Callable[..., Any],
    problem: Problem,
    framework: Framework,
    *,
    backward: Callable[..., Any] | None,
    gradients: bool,
    notes: list[str] | None = None,
    part: Callable[[Problem], Problem] = whole,
    together: Callable[[Callable[[], Any]], Any] = alone,
) -> dict[str, Array]:
    """Call fn on a problem, after whatever its case calls before.

    Parameters
    ----------
    fn : callable
    problem : Problem
    framework : Framework
    backward : callable, optional
        fn's; autograd stands in for it.
    gradients : bool
        Whether to ask for gradients.
    notes : list of str, optional
        Why there are no gradients is put here.
    part : callable
        Returns what fn gets of a problem.
    together : callable
        Does a piece of work, and raises on every rank if it failed on one: no rank may call what
        another one will not.

    Returns
    -------
    dict
        float64 arrays by name: out, and lse, dq, dk, dv as far as there are any.

    Raises
    ------
    ComplaintError
        A result has the wrong kind, shape or dtype, or an argument was written into.
    NotImplementedError
        fn says that it cannot do this.
    Exception
        Whatever fn raises.
    """
    calls = problem.case.calls
    if calls == "other dtype":
        others = [dtype for dtype in framework.dtypes if dtype != problem.dtype]
        before = [draw(problem.case, dtype, problem.seed + 1) for dtype in others[:1]]
    else:
        before = [draw(problem.case, problem.dtype, problem.seed + 1)] if calls else []

    def once(problem: Problem, gradients: bool, notes: list[str] | None) -> _Kept:
        call = _Call(fn, backward if gradients else None, gradients, framework, notes, together)
        kept: _Kept = together(lambda: call.once(part(problem)))
        return kept

    with framework.active():
        earlier = []
        for other in before:
            try:
                earlier.append(once(other, gradients and calls == "other data", None))
            except NotImplementedError:
                if calls == "other data":
                    raise  # nor can it do what is judged
        results = once(problem, gradients, notes)
        for call in earlier:
            _unchanged(call, framework, "was changed by the next call: its memory is used again")
    return results.copies


@dataclass(frozen=True)
class _Kept:
    """Arrays of the framework, by name, and what was in them."""

    arrays: dict[str, Any]
    copies: dict[str, Array]


@dataclass(frozen=True)
class _Call:
    """How the function is called."""

    fn: Callable[..., Any]
    backward: Callable[..., Any] | None
    gradients: bool
    framework: Framework
    notes: list[str] | None
    together: Callable[[Callable[[], Any]], Any]

    def once(self, problem: Problem) -> _Kept:
        """Call it forward and backward, and check what comes back."""
        framework = self.framework
        given, kept = _Kept({}, {}), _Kept({}, {})
        options: dict[str, Any] = {"scale": problem.scale}
        out, lse, why = self.together(lambda: self._forward(problem, given, options, kept))
        if self.gradients:
            q, k, v, dout = (given.arrays[name] for name in ("q", "k", "v", "dout"))
            found = None
            try:
                if self.backward is not None:
                    found = _three(self.backward(dout, q, k, v, out, lse, **options))
                elif callable(why):
                    found = why(dout)
            except NotImplementedError as error:
                why = f"the backward raised NotImplementedError: {error}".removesuffix(": ")
            if found is None and self.notes is not None:
                self.notes.append(str(why))
            for name, x in zip(("dq", "dk", "dv"), found or (), strict=False):
                _keep(kept, name, x, problem, framework)
        _unchanged(given, framework, "was written into")
        _unchanged(kept, framework, "was written into by the backward")
        return kept

    def _forward(
        self, problem: Problem, given: _Kept, options: dict[str, Any], kept: _Kept
    ) -> tuple[Any, Any, Any]:
        """Return out, lse, and what goes backward, or why nothing does; fill in all the rest."""
        arguments = _arguments(problem, self.framework)
        given.arrays.update(arguments)
        given.copies.update({name: self.framework.get(x) for name, x in arguments.items()})
        mask = arguments.get("mask")
        options["mask"] = self.framework.rule(problem.mask) if callable(problem.mask) else mask
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        why: Any = "the function has no backward"
        if self.gradients and self.backward is None:
            result, why = self.framework.differentiate(
                lambda *leaves: self.fn(*leaves, **options), q, k, v
            )
        else:
            result = self.fn(q, k, v, **options)
        out, lse = _forward(result)
        _keep(kept, "out", out, problem, self.framework)
        if lse is not None:
            _keep(kept, "lse", lse, problem, self.framework)
        return out, lse, why


def _arguments(problem: Problem, framework: Framework) -> dict[str, Any]:
    """Return q, k, v, dout and a mask that is an array, as the case has them in memory."""
    memory = problem.case.memory
    arguments = {
        name: framework.put(getattr(problem, name), _memory_of(name, memory))
        for name in ("q", "k", "v", "dout")
    }
    if isinstance(problem.mask, np.ndarray):
        arguments["mask"] = framework.put(
            problem.mask, "read-only" if memory == "read-only" else "contiguous"
        )
    return arguments


def _memory_of(name: str, memory: str) -> str:
    """Return how an argument is to lie in memory."""
    return "contiguous" if memory == "broadcast" and name == "q" else memory


def _forward(result: Any) -> tuple[Any, Any]:
    if isinstance(result, tuple | list):
        if len(result) != 2:
            raise ComplaintError(f"expected out or (out, lse), got {_kind(result)}")
        return result[0], result[1]
    return result, None


def _three(result: Any) -> tuple[Any, Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise ComplaintError(f"backward: expected (dq, dk, dv), got {_kind(result)}")
    return result[0], result[1], result[2]


def _keep(kept: _Kept, name: str, x: Any, problem: Problem, framework: Framework) -> None:
    """Put a result into `kept`, if it is what it should be."""
    if not framework.owns(x):
        raise ComplaintError(
            f"{name}: expected an array of {framework.name} on {framework.device}, got {_kind(x)}"
        )
    rows = problem.q.shape[:3]
    shape = {
        "out": (*rows, problem.v.shape[3]),
        "lse": rows,
        "dq": problem.q.shape,
        "dk": problem.k.shape,
        "dv": problem.v.shape,
    }[name]
    if tuple(x.shape) != shape:
        raise ComplaintError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    wanted = [problem.dtype]
    if name == "lse":  # more is welcome, less is not
        wanted = list(dict.fromkeys((accumulator(problem.dtype), "float64")))
    if dtype_name(x) not in wanted:
        raise ComplaintError(f"{name}: expected dtype {' or '.join(wanted)}, got {dtype_name(x)}")
    try:
        kept.copies[name] = framework.get(x)
    except Exception as error:  # a kernel that ran late, or memory that is not there any more
        raise ComplaintError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error
    kept.arrays[name] = x


def _unchanged(kept: _Kept, framework: Framework, what: str) -> None:
    """Complain of an array that holds something else than it did."""
    for name, x in kept.arrays.items():
        try:
            now, before = framework.get(x), kept.copies[name]
        except Exception as error:
            raise ComplaintError(f"{name}: {what}: {type(error).__name__}: {error}") from error
        changed = ~((now == before) | ((now != now) & (before != before)))  # NaN is NaN
        if changed.any():
            raise ComplaintError(f"{name}: {what} ({changed.sum()} of {changed.size} elements)")


def _kind(x: Any) -> str:
    """Say what something is that should have been something else."""
    if x is None:
        return "None"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}"
    where = getattr(x, "device", "") if hasattr(x, "dtype") else ""
    return f"{library(x)}.{type(x).__name__}{f' on {where}' if where else ''}"
