"""One call of a function and of its backward: the arguments it gets, and results validated."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.case_arrays import Problem
from lvxattn.check.frameworks import Framework
from lvxattn.common.validation import accumulator, dtype_name, library

Array = npt.NDArray[Any]

# together(work): do this rank's work; raises if any rank's raised.
Together = Callable[[Callable[[], Any]], Any]


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


@dataclass(frozen=True)
class Kept:
    """Arrays of the framework, by name, and copies of their contents at the time."""

    framework: Framework
    arrays: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, Array] = field(default_factory=dict)

    def add(self, name: str, x: Any) -> None:
        """Add an array and a copy of its contents."""
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
class Call:
    """One call of a function and of its backward."""

    problem: Problem
    fn: Callable[..., Any]
    backward: Callable[..., Any] | None
    gradients: bool
    framework: Framework
    on_ranks: bool

    def forward_and_backward(
        self,
        together: Together,
        notes: list[str] | None,
        between: Callable[[], Any] = lambda: None,
    ) -> Kept:
        """Call forward, what is to be called between, and backward; return validated results."""
        given, kept = Kept(self.framework), Kept(self.framework)
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

        between()
        if self.gradients:
            try:
                together(backward)
            except Exception as error:
                raise BackwardError(error, forward) from error
        return kept

    def _by_autograd(self) -> bool:
        return self.gradients and self.backward is None and self.framework.autograd

    def _forward_alone(self, error: Exception, together: Together, notes: list[str] | None) -> Kept:
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
        given: Kept,
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

    def _forward(self, given: Kept, options: dict[str, Any], kept: Kept) -> tuple[Any, Any, Any]:
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
        elif memory == "mixed":
            layouts |= {"q": "contiguous", "k": "sequence-major", "v": "cache"}
            layouts["dout"] = "transposed"
        if isinstance(self.problem.mask, np.ndarray):
            expanded = "broadcast" if self.problem.case.mask == "expanded" else "contiguous"
            layouts["mask"] = "read-only" if memory == "read-only" else expanded
        return {
            name: self.framework.put(getattr(self.problem, name), layout)
            for name, layout in layouts.items()
        }

    def _keep(self, kept: Kept, name: str, x: Any) -> None:
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
