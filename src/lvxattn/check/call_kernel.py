"""Call the function to be checked, and validate what it returns.

    fn(q, k, v, *, scale, mask) -> out  or  (out, lse)
    fn.backward(dout, q, k, v, out, lse, *, scale, mask) -> (dq, dk, dv)

Without a backward of its own, it is differentiated by autograd where the framework has that.  The
backward's lse is None if the function returns none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import call
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.frameworks import Framework
from lvxattn.common.validation import accumulator, dtype_name, library

Array = npt.NDArray[Any]

# together(work): do this rank's work; raises if any rank's raised.
Together = Callable[[Callable[[], Any]], Any]


# As many calls as show what happens once in 500, unless that takes too long.
_REPEATS, _REPEAT_SECONDS = 1500, 3.0
_REPEATS_ON_RANKS = 20  # a number: a limit of time would end the calls on some ranks only


class ContractError(Exception):
    """The function broke its contract.

    Attributes
    ----------
    results : dict
        Those of the forward, float64 by name, if only the backward failed.
    """

    def __init__(self, message: str, results: dict[str, Array] | None = None) -> None:
        super().__init__(message)
        self.results = results or {}


class BackwardError(Exception):
    """The backward failed, by the error that is this one's cause; the forward can be judged.

    Attributes
    ----------
    results : dict
        Those of the forward, float64 by name.
    """

    def __init__(self, error: Exception, results: dict[str, Array]) -> None:
        super().__init__(str(error))
        self.results = results


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
    elif calls == "other data":
        before = [draw(problem.case, problem.dtype, problem.seed + 1)]

    def call_once(problem: Problem, gradients: bool, notes: list[str] | None) -> _Kept:
        each = _Call(part(problem), fn, backward, gradients, framework, on_ranks)
        return each.forward_and_backward(together, notes)

    with framework.active():
        earlier = []
        for other in before:
            try:
                earlier.append(call_once(other, gradients and calls == "other data", None))
            except NotImplementedError:
                if calls == "other data":
                    raise  # then the judged problem is unsupported, too
        results = call_once(problem, gradients, notes)
        for kept in earlier:
            kept.assert_unchanged("was changed by the next call: its memory is used again")
        judged = results.copies
        # Our own kernels say whether their calls can differ.
        if calls == "repeated" and getattr(fn, "keeps_state", True):
            again = _repeats(lambda: call_once(problem, False, None).copies, on_ranks)
            judged = {**judged, **_farthest([judged, *again])}
        if last is not None:
            last.look_back()
            last.keep(problem, results)
    return judged


def _repeats(work: Callable[[], dict[str, Array]], on_ranks: bool) -> list[dict[str, Array]]:
    """Return the results of the same call again and again."""
    if on_ranks:
        return [work() for _ in range(_REPEATS_ON_RANKS)]
    start, found = perf_counter(), list[dict[str, Array]]()
    while len(found) < _REPEATS and perf_counter() - start < _REPEAT_SECONDS:
        found.append(work())
    return found


@np.errstate(invalid="ignore")
def _farthest(found: list[dict[str, Array]]) -> dict[str, Array]:
    """Return out and lse of the call that is farthest from most."""
    distance = np.zeros(len(found))
    for name in found[-1]:
        every = np.stack([results[name] for results in found])
        usual = np.sort(every, axis=0)[len(found) // 2]  # the median, NaN only if most are
        same = (every == usual) | (np.isnan(every) & np.isnan(usual))
        apart = np.where(same, 0.0, np.nan_to_num(abs(every - usual), nan=np.inf))
        distance = np.maximum(distance, apart.reshape(len(found), -1).max(axis=1, initial=0.0))
    worst = found[int(np.argmax(distance))]
    return {name: worst[name] for name in found[-1]}


class LastResults:
    """The results of a call, kept to see whether the function changes them later."""

    def __init__(self) -> None:
        self._kept: tuple[str, _Kept] | None = None

    def keep(self, problem: Problem, results: "_Kept") -> None:
        """Keep results instead of earlier ones."""
        self._kept = f"{problem.case.name}, {problem.dtype}, seed {problem.seed}", results

    def look_back(self) -> None:
        """Raise a ContractError if the results have changed, and forget them.

        Called where the framework is active.
        """
        if self._kept is not None:
            (where, kept), self._kept = self._kept, None
            kept.assert_unchanged(f"the result for {where} was changed after it was returned")


@dataclass(frozen=True)
class _Kept:
    """Arrays of the framework, by name, and copies of their contents at the time."""

    framework: Framework
    arrays: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, Array] = field(default_factory=dict)

    def add(self, name: str, x: Any) -> None:
        self.copies[name] = self.framework.get(x)
        self.arrays[name] = x

    def assert_unchanged(self, what: str) -> None:
        """Raise a ContractError if the contents of an array have changed."""
        for name, x in self.arrays.items():
            try:
                now, before = self.framework.get(x), self.copies[name]
            except Exception as error:
                raise ContractError(f"{name}: {what}: {type(error).__name__}: {error}") from error
            changed = ~((now == before) | ((now != now) & (before != before)))  # NaN is NaN
            if changed.any():
                raise ContractError(f"{name}: {what} ({changed.sum()} of {changed.size} elements)")


@dataclass(frozen=True)
class _Call:
    """One call of a function and of its backward."""

    problem: Problem
    fn: Callable[..., Any]
    backward: Callable[..., Any] | None
    gradients: bool
    framework: Framework
    on_ranks: bool

    def forward_and_backward(self, together: Together, notes: list[str] | None) -> _Kept:
        """Call forward and backward; return validated results."""
        given, kept = _Kept(self.framework), _Kept(self.framework)
        options: dict[str, Any] = {"scale": self.problem.scale}
        try:
            out, lse, why = together(lambda: self._forward(given, options, kept))
        except ContractError:
            raise
        except Exception as error:
            if self.on_ranks or not self._by_autograd():
                raise
            return self._forward_alone(error, together, notes)
        forward = dict(kept.copies)

        def backward() -> None:
            found = self._backward(given, out, lse, options, why, notes)
            for name, x in zip(("dq", "dk", "dv"), found or (), strict=False):
                self._keep(kept, name, x)
            given.assert_unchanged("was written into")
            kept.assert_unchanged("was written into by the backward")

        if self.gradients:
            try:
                together(backward)
            except Exception as error:
                raise BackwardError(error, forward) from error
        return kept

    def _by_autograd(self) -> bool:
        return self.gradients and self.backward is None and self.framework.autograd

    def _forward_alone(
        self, error: Exception, together: Together, notes: list[str] | None
    ) -> _Kept:
        """Call forward for no gradients, after it has raised an error: perhaps about them."""
        try:
            kept = replace(self, gradients=False).forward_and_backward(together, None)
        except Exception:
            raise error from None
        if not isinstance(error, NotImplementedError):
            raise BackwardError(error, kept.copies) from error
        if notes is not None:
            notes.append(f"for gradients it raised NotImplementedError: {error}".removesuffix(": "))
        return kept

    def _backward(
        self,
        given: _Kept,
        out: Any,
        lse: Any,
        options: dict[str, Any],
        why: Any,
        notes: list[str] | None,
    ) -> Any:
        """Return (dq, dk, dv), or None if there are none: then the notes say why."""
        q, k, v, dout = (given.arrays[name] for name in ("q", "k", "v", "dout"))
        found = None
        try:
            if self.backward is not None:
                found = self.backward(dout, q, k, v, out, lse, **options)
                if not isinstance(found, tuple | list) or len(found) != 3:
                    raise ContractError(f"backward: expected (dq, dk, dv), got {_kind(found)}")
            elif callable(why):
                found = why(dout)
        except NotImplementedError as error:
            why = f"the backward raised NotImplementedError: {error}".removesuffix(": ")
        if found is None and notes is not None:
            notes.append(str(why))
        return found

    def _forward(self, given: _Kept, options: dict[str, Any], kept: _Kept) -> tuple[Any, Any, Any]:
        """Fill in given, options and kept; return out, lse, and a pullback or why there is none."""
        for name, x in self._arguments().items():
            given.add(name, x)
        mask = self.problem.mask
        options["mask"] = self.framework.rule(mask) if callable(mask) else given.arrays.get("mask")
        q, k, v = (given.arrays[name] for name in ("q", "k", "v"))
        why: Any = "the function has no backward"
        if self.gradients and self.backward is None:
            result, why = self.framework.differentiate(
                lambda *leaves: self.fn(*leaves, **options), q, k, v
            )
        else:
            result = self.fn(q, k, v, **options)
        pair = isinstance(result, tuple | list)
        if pair and len(result) != 2:
            raise ContractError(f"expected out or (out, lse), got {_kind(result)}")
        out, lse = result if pair else (result, None)
        self._keep(kept, "out", out)
        if lse is not None:
            self._keep(kept, "lse", lse)
        given.assert_unchanged("was written into")
        return out, lse, why

    def _arguments(self) -> dict[str, Any]:
        """Return q, k, v, dout and a mask that is an array, in the case's memory layout."""
        memory = self.problem.case.memory
        layouts = dict.fromkeys(("q", "k", "v", "dout"), memory)
        if memory == "broadcast":
            layouts["q"] = "contiguous"
        if isinstance(self.problem.mask, np.ndarray):
            expanded = "broadcast" if self.problem.case.mask == "expanded" else "contiguous"
            layouts["mask"] = "read-only" if memory == "read-only" else expanded
        return {
            name: self.framework.put(getattr(self.problem, name), layout)
            for name, layout in layouts.items()
        }

    def _keep(self, kept: _Kept, name: str, x: Any) -> None:
        """Add a result to `kept` if it has the expected kind, shape and dtype."""
        framework, problem = self.framework, self.problem
        if not framework.owns(x):
            raise ContractError(
                f"{name}: expected an array of {framework.name} on {framework.device}, "
                f"got {_kind(x)}"
            )
        wrong = mismatch(name, x, result_shapes(problem)[name], problem.dtype)
        if wrong:
            raise ContractError(wrong)
        try:
            kept.add(name, x)
        except Exception as error:  # of a kernel that ran asynchronously, or of freed memory
            raise ContractError(
                f"{name}: cannot be read: {type(error).__name__}: {error}"
            ) from error


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


def result_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Return the shape of each result of a problem, by name."""
    rows = problem.q.shape[:3]
    return {
        "out": (*rows, problem.v.shape[3]),
        "lse": rows,
        "dq": problem.q.shape,
        "dk": problem.k.shape,
        "dv": problem.v.shape,
    }


def mismatch(name: str, x: Any, shape: tuple[int, ...], dtype: str) -> str:
    """Return how a result differs from the expected shape and dtype; empty if it does not.

    Parameters
    ----------
    name : str
        out, lse, dq, dk or dv.
    x : array
    shape : tuple of int
    dtype : str
        Of the problem.
    """
    if tuple(x.shape) != shape:
        return f"{name}: expected shape {shape}, got {tuple(x.shape)}"
    wanted = [dtype]
    if name == "lse":  # more precision is allowed, less is not
        wanted = list(dict.fromkeys((accumulator(dtype), "float64")))
    if dtype_name(x) not in wanted:
        return f"{name}: expected dtype {' or '.join(wanted)}, got {dtype_name(x)}"
    return ""


def _kind(x: Any) -> str:
    """Describe an unexpected object."""
    if x is None:
        return "None"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}"
    where = getattr(x, "device", "") if hasattr(x, "dtype") else ""
    return f"{library(x)}.{type(x).__name__}{f' on {where}' if where else ''}"
