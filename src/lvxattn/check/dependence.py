"""What failures depend on: a condition that tells them from what passed, and the smallest problem.

fails only where H_KV > 8: 39 of 40 problems there, and none of 227 others
smallest that fails, ...: B 1, H 9, H_KV 9, S_Q 1, S_KV 1, D 1, D_V 1
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

from lvxattn.check.cases import Case
from lvxattn.check.shards import Cut

Trial = TypeVar("Trial", Case, tuple[Case, Cut])

_SIZES = ("B", "H", "H_KV", "S_Q", "S_KV", "D", "D_V")
_KINDS = ("dtype", "mask", "memory", "data", "calls")
_OTHERS = ("scale", "cut", "group", "group of ranks")  # of few values, too
_LEAST = 3  # problems that fail: fewer have too much in common
_MOST = 2  # parts of a condition
_CALLS, _SECONDS = 60, 30.0  # of the function, to find the smallest problem

# What a problem has, by name: sizes, kinds, and relations between sizes.
Traits = dict[str, Any]
Holds = Callable[[Traits], bool]


def condition(
    tried: Sequence[tuple[Case, str, bool]], where: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return the condition under which problems fail.

    Parameters
    ----------
    tried : sequence of (Case, str, bool)
        Problems: their case and dtype, and whether they failed.
    where : sequence of mapping, optional
        How each was cut for ranks: `sweep.described`.

    Returns
    -------
    str
        ``"fails only where H_KV > 8: ..."``; empty if there is none that tells most failures from
        what passed, or there are few failures.
    """
    failed, passed = (
        [
            _traits(case, dtype) | dict(more)
            for (case, dtype, fails), more in zip(tried, where or [{}] * len(tried), strict=True)
            if fails is which
        ]
        for which in (True, False)
    )
    if len(failed) < _LEAST or not passed:
        return ""
    inside, names = passed, list[str]()
    while len(names) < _MOST and inside:
        conditions = list(_conditions(failed, inside))
        excluded, name, holds = max(conditions, key=lambda found: found[0], default=(0, "", None))
        if holds is None or 2 * excluded < len(inside):
            break
        names.append(name)
        inside = [traits for traits in inside if holds(traits)]
    if not names or len(inside) > len(failed):
        return ""
    count = f"{len(failed)} of {len(failed) + len(inside)} problems there"
    return (
        f"fails only where {' and '.join(names)}: {count}, "
        f"and none of {len(passed) - len(inside)} others"
    )


def _traits(case: Case, dtype: str) -> Traits:
    kinds = {"dtype": dtype, **{name: getattr(case, name) for name in _KINDS[1:]}}
    return {name: getattr(case, name) for name in _SIZES} | kinds | {
        "H / H_KV": case.H // case.H_KV,
        "D_V - D": case.D_V - case.D,
        "S_Q - S_KV": case.S_Q - case.S_KV,
        "scale": "default" if case.scale is None else case.scale,
    }  # fmt: skip


def _conditions(
    failed: Sequence[Traits], passed: Sequence[Traits]
) -> Iterator[tuple[int, str, Holds]]:
    """Yield conditions on one trait that hold for all failures: how many others they exclude."""

    def counted(name: str, holds: Holds) -> tuple[int, str, Holds]:
        return sum(not holds(traits) for traits in passed), name, holds

    for name in failed[0]:
        values = {traits[name] for traits in failed}
        others = {traits[name] for traits in passed} - values
        if name in (*_KINDS, *_OTHERS):
            if others and len(values) <= len(others):
                these = ", ".join(sorted(str(x) or "none" for x in values))
                text = f"{name} is {these}" if len(values) == 1 else f"{name} is one of ({these})"
                yield counted(text, _one_of(name, values))
            continue
        below, above = (
            [x for x in others if x < min(values)],
            [x for x in others if x > max(values)],
        )
        if below and above and len(values) == 1:
            yield counted(f"{name} is {min(values)}", _one_of(name, values))
        if below:
            yield counted(f"{name} > {max(below)}", _above(name, max(below)))
        if above:
            yield counted(f"{name} < {min(above)}", _below(name, min(above)))


def _one_of(name: str, values: set[Any]) -> Holds:
    return lambda traits: traits[name] in values


def _above(name: str, size: int) -> Holds:
    return lambda traits: bool(traits[name] > size)


def _below(name: str, size: int) -> Holds:
    return lambda traits: bool(traits[name] < size)


def smallest(
    trial: Trial, fails: Callable[[Trial], bool], simpler: Callable[[Trial], Iterator[Trial]]
) -> tuple[Trial, dict[Trial, bool]]:
    """Return the smallest trial that still fails, as far as a few calls find it.

    Parameters
    ----------
    trial : Case, or a pair of it and a Cut
        Fails.
    fails : callable
        Whether a trial fails; it calls the function.
    simpler : callable
        Yields simpler trials: `simpler_cases`, or `simpler_on_ranks`.

    Returns
    -------
    smallest : as trial
    tried : dict
        By trial, whether it failed.
    """
    tried: dict[Trial, bool] = {}
    start = perf_counter()
    failing: Trial | None = trial
    while failing:
        trial, failing = failing, None
        for smaller in simpler(trial):
            if len(tried) == _CALLS or perf_counter() - start > _SECONDS:
                break
            if smaller not in tried:
                tried[smaller] = fails(smaller)
            if tried[smaller]:
                failing = smaller
                break
    return trial, tried


def described(case: Case) -> str:
    """Format what is not usual in a case, and its sizes."""
    usual = Case("", "", "")
    kinds = {name: getattr(case, name) for name in (*_KINDS[1:], "scale")}
    parts = [f"{name} {getattr(case, name)}" for name in _SIZES]
    parts += [f"{name} {x}" for name, x in kinds.items() if x != getattr(usual, name)]
    return ", ".join(parts)


def simpler_on_ranks(trial: tuple[Case, Cut]) -> Iterator[tuple[Case, Cut]]:
    """Yield fewer ranks, then simpler cuts and groups, then simpler cases."""
    case, cut = trial
    for P in range(1, cut.P):
        fewer = replace(cut, P=P, ranks=cut.ranks[:P])
        if fewer.fitted(case) == case:
            yield case, fewer
    if cut.ranks:
        yield case, replace(cut, ranks=())
    if cut.kind not in ("even", "divisible"):
        yield case, replace(cut, kind="even")
    yield from ((smaller, cut) for smaller in simpler_cases(case) if cut.fitted(smaller) == smaller)


def simpler_cases(case: Case) -> Iterator[Case]:
    """Yield simpler cases, the boldest steps first."""
    usual: dict[str, Any] = {
        "calls": "",
        "memory": "contiguous",
        "mask": "none",
        "data": "gaussian",
        "scale": None,
    }
    for name, value in usual.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    if case.data == "one-hot":  # whose results are known for its own sizes alone
        return
    group = case.H // case.H_KV
    for H_KV in _less(case.H_KV):
        yield replace(case, H_KV=H_KV, H=H_KV * group)
    if group > 1:
        yield replace(case, H=case.H_KV)
    if case.D == case.D_V:
        yield from (replace(case, D=D, D_V=D) for D in _less(case.D))
    for name in ("B", "S_Q", "S_KV", "D", "D_V"):
        sizes: list[Any] = [{name: size} for size in _less(getattr(case, name))]
        yield from (replace(case, **smaller) for smaller in sizes)


def _less(size: int) -> list[int]:
    return sorted({1, size // 4, size // 2, 3 * size // 4, size - 1} & set(range(1, size)))
