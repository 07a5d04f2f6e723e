"""Calling the function that is checked, and holding it to its word.

    fn(q, k, v, *, scale, mask) -> out  or  (out, lse)
    fn.backward(dout, q, k, v, out, lse, *, scale, mask) -> (dq, dk, dv)

Without a backward of its own, autograd differentiates it where the framework has that.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lvxattn.reference.check.frameworks import Framework
from lvxattn.reference.check.problem import Problem, draw
from lvxattn.reference.validation import accumulator, dtype_name

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


def play(
    fn: Callable[..., Any],
    problem: Problem,
    framework: Framework,
    *,
    backward: Callable[..., Any] | None,
    gradients: bool,
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
    for other in before:
        try:
            asked = gradients and calls == "other data"
            _once(fn, part(other), framework, backward, asked, together)
        except NotImplementedError:
            if calls == "other data":
                raise  # nor can it do what is judged
    return _once(fn, part(problem), framework, backward, gradients, together)


def _once(
    fn: Callable[..., Any],
    problem: Problem,
    framework: Framework,
    backward: Callable[..., Any] | None,
    gradients: bool,
    together: Callable[[Callable[[], Any]], Any],
) -> dict[str, Array]:
    results: dict[str, Array] = together(
        lambda: _held(fn, problem, framework, backward, gradients, together)
    )
    return results


def _held(
    fn: Callable[..., Any],
    problem: Problem,
    framework: Framework,
    backward: Callable[..., Any] | None,
    gradients: bool,
    together: Callable[[Callable[[], Any]], Any],
) -> dict[str, Array]:
    memory = problem.case.memory
    arguments = {
        name: framework.put(getattr(problem, name), _memory_of(name, memory))
        for name in ("q", "k", "v", "dout")
    }
    if isinstance(problem.mask, np.ndarray):
        arguments["mask"] = framework.put(problem.mask)
    given = {name: framework.get(x) for name, x in arguments.items()}
    q, k, v, dout = (arguments[name] for name in ("q", "k", "v", "dout"))
    options = {"scale": problem.scale, "mask": arguments.get("mask", problem.mask)}
    results: dict[str, Array] = {}

    def forward(*leaves: Any) -> Any:
        result = fn(*leaves, **options)
        out, lse = _forward(result)
        results["out"] = _checked("out", out, problem, framework)
        if lse is not None:
            results["lse"] = _checked("lse", lse, problem, framework)
        return result

    found: tuple[Any, Any, Any] | None = None
    if gradients and backward is None:
        result, found = framework.differentiate(
            lambda *leaves: together(lambda: forward(*leaves)), q, k, v, dout
        )
    else:
        result = together(lambda: forward(q, k, v))
    out, lse = _forward(result)
    if gradients and backward is not None:
        try:
            found = _three(backward(dout, q, k, v, out, lse, **options))
        except NotImplementedError:
            found = None
    if found is not None:
        for name, x in zip(("dq", "dk", "dv"), found, strict=True):
            results[name] = _checked(name, x, problem, framework)
    for name, x in arguments.items():
        changed = framework.get(x) != given[name]
        if changed.any():
            raise ComplaintError(
                f"{name}: was written into ({changed.sum()} of {changed.size} elements)"
            )
    return results


def _memory_of(name: str, memory: str) -> str:
    """Return how an argument is to lie in memory."""
    return "contiguous" if memory == "broadcast" and name == "q" else memory


def _forward(result: Any) -> tuple[Any, Any]:
    if isinstance(result, tuple | list):
        if len(result) != 2:
            raise ComplaintError(f"expected out or (out, lse), got {len(result)} results")
        return result[0], result[1]
    return result, None


def _three(result: Any) -> tuple[Any, Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 3:
        what = (
            f"{len(result)} results" if isinstance(result, tuple | list) else type(result).__name__
        )
        raise ComplaintError(f"backward: expected (dq, dk, dv), got {what}")
    return result[0], result[1], result[2]


def _checked(name: str, x: Any, problem: Problem, framework: Framework) -> Array:
    """Return a result in NumPy's float64, if it is what it should be."""
    if not framework.owns(x):
        kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
        raise ComplaintError(
            f"{name}: expected an array of {framework.name} on its device, got {kind}"
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
    return framework.get(x)
