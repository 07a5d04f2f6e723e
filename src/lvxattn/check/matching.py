"""Find the wrong kernels that behave like a failing function on one problem.

A wrong kernel matches if its results are those of the function up to a tenth of the error, and NaN
and infinities are where the function has them.  It runs in fp64, so that the remainder is the
function's own rounding, and in the dtype, for effects of its range.  If out or lse is wrong, only
these are compared: autograd and a hand-written backward follow a wrong forward in different ways.
A kernel that rounds too much cannot match bit by bit: if nothing else matches, it is compared by
the size of its error.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.call_kernel import call_kernel
from lvxattn.check.case_arrays import Problem
from lvxattn.check.frameworks.numpy_arrays import NumPy
from lvxattn.check.judge import RESULTS, Truth, difference, disagree, norms
from lvxattn.check.shards import Cut
from lvxattn.check.wrong import KERNELS, WRONG, KernelBase, OnRanks

Array = npt.NDArray[Any]

_NUMPY = NumPy()  # once: it looks for packages


@dataclass(frozen=True)
class Match:
    """A wrong kernel that behaves like the function.

    Attributes
    ----------
    name : str
    arguments : dict
        The kernel's, one of its `variants`.
    distance : float
        Relative L2 distance from its results to the function's.
    limits : float
        The same in units of the limit; for a comparison by size, the larger error over the smaller.
    """

    name: str
    arguments: dict[str, Any]
    distance: float = 0.0
    limits: float = 0.0

    def __str__(self) -> str:
        """Return the diagnosis of the failure."""
        shown = {name: x for name, x in self.arguments.items() if (name, x) != ("shards", 1)}
        options = ", ".join(f"{name} = {x}" for name, x in shown.items())
        name = f"*{self.name}*" + (f" ({options})" if options else "")
        compare = KERNELS[self.name].compare
        if compare == "size":
            return f"error as large as that of {name}"
        if compare == "message":
            return f"matches {name}"
        return f"matches {name} {f'to {self.distance:.0e}' if self.distance else 'exactly'}"


@dataclass(frozen=True)
class Failure:
    """A problem on which the function failed.

    Attributes
    ----------
    problem : Problem
    results : dict
        The function's, float64 by name.
    truth : Truth
        Of the problem.
    cut : Cut, optional
        Of the problem, for a distributed function.
    """

    problem: Problem
    results: dict[str, Array]
    truth: Truth
    cut: Cut | None = None

    @cached_property  # used for every kernel that is compared
    def errors(self) -> dict[str, Array]:
        """The errors of the results, for each kind of row."""
        want = self.truth.results
        return {
            name: norms(self.problem, name, difference(x, want[name]))
            for name, x in self.results.items()
        }

    def along(self, name: str) -> float:
        """Return the cosine of a result's error and the truth: near 0 for a mere rounding error."""
        want, own = self.truth.results[name], self.results[name]
        finite = np.isfinite(want) & np.isfinite(own)
        with np.errstate(over="ignore", invalid="ignore"):
            return float(_direction(own[finite] - want[finite]) @ _direction(want[finite]))

    def astray(self, name: str) -> bool:
        """Whether NaN or infinities of a result differ from the truth's."""
        return bool(disagree(self.results[name], self.truth.results[name]).any())

    def deciding(self) -> list[str]:
        """Return the results to compare: out and lse if one of them is wrong, otherwise all."""
        forward: list[str] = [name for name in ("out", "lse") if name in self.results]
        wrong = any(
            self.astray(name) or (self.errors[name] > self.truth.limits[name]).any()
            for name in forward
        )
        return forward if wrong else list(self.results)


def matches(names: Collection[str], failure: Failure) -> list[Match]:
    """Return the wrong kernels that match: the nearest, and those about as near.

    Parameters
    ----------
    names : collection of str
        Keys of `KERNELS`, in whose order they are tried.
    failure : Failure
    """
    given = failure.problem
    wide = replace(given.astype(np.float64), dtype="float64")
    for compare, problems, among in (
        ("values", [wide, given] if given.dtype != "float64" else [given], failure.deciding()),
        ("size", [given], list(failure.results)),
    ):
        found = [
            match
            for name, kernel in KERNELS.items()
            if name in names and kernel.compare == compare
            for match in _nearest(name, failure, problems, among)
        ]
        if found:
            best = min(match.limits for match in found)
            return [match for match in found if match.limits <= max(1.0, 2 * best)]
    return []


def message_matches(names: Collection[str], problem: Problem, message: str) -> list[Match]:
    """Return the wrong kernels that fail with the same error message.

    Parameters
    ----------
    names : collection of str
    problem : Problem
    message : str
        The function's error.
    """
    return [
        Match(name, {})
        for name, kernel in WRONG.items()
        if name in names
        and kernel.compare == "message"
        and same_message(run_kernel(kernel(), problem, RESULTS), message)
    ]


def same_message(results: dict[str, Array] | str, message: str) -> bool:
    """Whether a wrong kernel's error, instead of results, is part of a message."""
    return isinstance(results, str) and results in message


def run_kernel(
    kernel: KernelBase | OnRanks, problem: Problem, names: Collection[str], cut: Cut | None = None
) -> dict[str, Array] | str:
    """Return a wrong kernel's results, or its error message.

    Parameters
    ----------
    kernel : KernelBase or OnRanks
    problem : Problem
    names : collection of str
        Results that are needed.
    cut : Cut, optional
        Of the problem, for a distributed function.
    """
    gradients = bool({"dq", "dk", "dv"} & set(names))
    try:
        if isinstance(kernel, OnRanks):
            return kernel.results(problem, cut) if cut else "there are no ranks"
        return call_kernel(kernel, problem, _NUMPY, backward=kernel.backward, gradients=gradients)
    except Exception as error:  # a ContractError, or NumPy's, such as that q is read-only
        return str(error)


def compare_results(
    name: str, arguments: dict[str, Any], failure: Failure, results: dict[str, Array]
) -> list[Match]:
    """Return a match if the results of a wrong kernel are near those of the function."""
    compare = _sizes if KERNELS[name].compare == "size" else _values
    near = compare(failure, results)
    return [] if near is None else [Match(name, arguments, *near)]


def _nearest(
    name: str, failure: Failure, problems: Iterable[Problem], among: Collection[str]
) -> list[Match]:
    """Return the nearest match of one kernel's variants, if any."""
    for problem in problems:
        found = []
        for arguments in KERNELS[name].variants:
            results = run_kernel(KERNELS[name](**arguments), problem, among, failure.cut)
            if not isinstance(results, str):
                found += compare_results(name, arguments, failure, {x: results[x] for x in among})
        if found:
            return sorted(found, key=lambda match: match.limits)[:1]
    return []


def _values(failure: Failure, results: dict[str, Array]) -> tuple[float, float] | None:
    """Return the distance from the function's results, relative and in limits, if that is small."""
    distance = limits = 0.0
    for name, x in results.items():
        own, limit, error = failure.results[name], failure.truth.limits[name], failure.errors[name]
        if disagree(own, x).any():
            return None
        apart = norms(failure.problem, name, difference(own, x))
        # A small error is hidden by the function's own rounding, which the limit bounds.
        near = np.maximum(error / 10, np.minimum(error / 3, limit))
        if (apart > np.where(error > limit, near, 2 * limit)).any():
            return None
        size = np.maximum(norms(failure.problem, name, own), failure.truth.scales[name])
        distance = max(distance, _ratio(apart, size))
        limits = max(limits, _ratio(apart, limit))
    return distance, limits


def _sizes(failure: Failure, results: dict[str, Array]) -> tuple[float, float] | None:
    """Return a distance of 0, and the ratio of the sizes of the errors, if that is small."""
    worst, fails, other = 1.0, False, replace(failure, results=results)
    for name in results:
        if failure.astray(name) or other.astray(name):
            return None
        limit, ours, theirs = failure.truth.limits[name], failure.errors[name], other.errors[name]
        fails = fails or bool((theirs > limit).any())
        if (ours > limit).any() and abs(failure.along(name) - other.along(name)) > 0.8:
            return None
        ours, theirs = np.maximum(ours, limit), np.maximum(theirs, limit)  # if both pass: alike
        worst = max(worst, _ratio(ours, theirs), _ratio(theirs, ours))
    return (0.0, worst) if fails and worst <= 3 else None


def _direction(x: Array) -> Array:
    """Return x at length 1, or 0; scaled first, as float64's largest number has no square."""
    x = x / (abs(x).max(initial=0.0) or 1.0)
    return np.asarray(x / (np.linalg.norm(x) or 1.0))


def _ratio(x: Array, y: Array) -> float:
    return float(np.where(x == 0, 0.0, x / np.where(y == 0, 1.0, y)).max())
