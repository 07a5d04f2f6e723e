"""Test the oracle on kernels that are known to be wrong or correct.

Every wrong kernel must be caught by some case; every case must be, in its group, the only one to
catch some wrong kernel; correct kernels must not fail.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from string import ascii_letters, digits
from textwrap import wrap
from typing import Any

from lvxattn.check.call_kernel import call_kernel
from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.cases import CASES, suite_of
from lvxattn.check.correct_kernels import correct_kernels
from lvxattn.check.covering import pairs
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.judge import RESULTS, Truth, ratio_of, truth_for
from lvxattn.check.suite import attempt
from lvxattn.check.wrong import WRONG
from lvxattn.common.new_file import write_file

_SHORT = {"float64": "64", "float32": "32", "float16": "16", "bfloat16": "b16"}
_USUAL = {"NumPy": ("float64", "float32"), "PyTorch": ("float32", "bfloat16")}
_WIDTH = 110
_SHOWN = 4


@dataclass(frozen=True)
class SelfTest:
    """The outcome of a self-test.

    Attributes
    ----------
    caught : dict
        By wrong kernel, by case that catches it, the dtypes in which it does.
    ratios : dict
        By correct kernel, by dtype, the largest error over its limit.
    alarms : tuple of str
        False alarms: where correct kernels failed.
    seeds : int
        Number of problems of each case that correct kernels ran on.

    Examples
    --------
    >>> caught = {"no scale": {}, "heads tiled": {"one-query": ["float32"]}}
    >>> found = SelfTest(caught, {"naive": {"float32": 0.5}}, (), seeds=1)
    >>> found.missed(), found.passed
    (['no scale'], False)
    """

    caught: dict[str, dict[str, list[str]]]
    ratios: dict[str, dict[str, float]]
    alarms: tuple[str, ...]
    seeds: int

    @property
    def passed(self) -> bool:
        """Whether all are caught, no case is redundant, and there are no false alarms."""
        return not (self.missed() or self.redundant() or self.alarms)

    def missed(self, dtypes: Sequence[str] | None = None) -> list[str]:
        """Return the wrong kernels that no case catches.

        Parameters
        ----------
        dtypes : sequence of str, optional
            Only in these dtypes, and by the quick suite.
        """
        if dtypes is None:
            return [name for name, cases in self.caught.items() if not cases]
        quick = [case.name for case in suite_of("quick")]
        return [
            name
            for name, cases in self.caught.items()
            if not any(set(cases.get(case, [])) & set(dtypes) for case in quick)
        ]

    def unique(self) -> dict[str, list[str]]:
        """Return, by case, the wrong kernels that no other case of its group catches."""
        return {
            case.name: [
                name
                for name, cases in self.caught.items()
                if [c.name for c in CASES if c.group == case.group and c.name in cases]
                == [case.name]
            ]
            for case in CASES
        }

    def redundant(self) -> list[str]:
        """Return the cases that are never the only one of their group to catch a wrong kernel."""
        return [case for case, names in self.unique().items() if not names]

    def __str__(self) -> str:
        """Format as text."""
        parts = (_table, _legend, _missed, _correct, _verdict)
        return "\n\n".join("\n".join(part(self)) for part in parts)


def self_test(*, seeds: int = 2, path: str | None = None) -> SelfTest:
    """Test the oracle on wrong kernels and on correct ones, in minutes.

    Parameters
    ----------
    seeds : int
        Number of problems of each case of the quick suite for the correct kernels, in every dtype.
    path : str, optional
        A Markdown file to write the outcome to.

    Returns
    -------
    SelfTest

    Raises
    ------
    ValueError
        seeds is below 1.
    OSError
        The file cannot be written; it is as it was before.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    ratios, alarms = check_correct_kernels(seeds)
    found = SelfTest(check_wrong_kernels(), ratios, alarms, seeds)
    if path is not None:
        lines = [
            "# Self-test of the oracle",
            "",
            "Written by `python -m lvxattn.check self-test`, which runs every wrong kernel",
            "on every case, in every dtype, seed 0, and correct kernels of several kinds",
            f"on the quick suite with {seeds} seeds.",
            "",
            f"```text\n{found}\n```",
        ]
        write_file(path, "\n".join(lines) + "\n")
    return found


def check_wrong_kernels(
    dtypes: Sequence[str] | None = None, names: Iterable[str] = tuple(WRONG)
) -> dict[str, dict[str, list[str]]]:
    """Return, by wrong kernel, by case that catches it, the dtypes in which it does.

    Parameters
    ----------
    dtypes : sequence of str, optional
        Default: all.
    names : iterable of str
        Of wrong kernels.
    """
    numpy = framework_of("numpy")
    caught: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for case in [*CASES, *pairs()]:
        for dtype in dtypes or numpy.dtypes:
            # In combinations only what is caught by no other case.
            left = {
                name: cases
                for name, cases in caught.items()
                if case.group != "combinations" or not cases.keys() - {case.name}
            }
            if not left:
                continue
            problem, truth = draw(case, dtype), truth_for(case, dtype, 0)
            for name, cases in left.items():
                if not _worst(WRONG[name](), numpy, problem, truth) <= 1:
                    cases.setdefault(case.name, []).append(dtype)
    return caught


def check_correct_kernels(seeds: int) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Return the largest errors of correct kernels over their limits, and where these exceed 1.

    Parameters
    ----------
    seeds : int
        Number of problems of each case of the quick suite; of longer ones there is one.
    """
    dtypes = framework_of("numpy").dtypes
    ratios = {kernel.name: dict.fromkeys(dtypes, 0.0) for kernel in correct_kernels()}
    alarms = []
    for case in CASES:
        for seed in range(seeds if case.quick else 1):
            for dtype in dtypes:
                problem, truth = draw(case, dtype, seed), truth_for(case, dtype, seed)
                for kernel in correct_kernels():
                    ratio = _worst(kernel.make(), kernel.framework, problem, truth)
                    ratios[kernel.name][dtype] = max(ratios[kernel.name][dtype], ratio)
                    if not ratio <= 1:
                        where = f"{kernel.name}: {case.name}, {dtype}, seed {seed}"
                        alarms.append(f"{where}: {ratio:.2f} of the limit")
    return ratios, tuple(alarms)


def _worst(fn: Callable[..., Any], framework: Framework, problem: Problem, truth: Truth) -> float:
    """Return a function's largest error over its limit; infinity if it raises."""
    backward = getattr(fn, "backward", None)
    work = partial(call_kernel, fn, problem, framework, backward=backward, gradients=True)
    results, status, _ = attempt(work)
    if status:
        return inf
    return max(ratio_of(x, results[x], problem, truth) for x in RESULTS if x in results)


def _table(found: SelfTest) -> Iterator[str]:
    """Yield a line for each wrong kernel, with a column for each case."""
    unique, letters, groups = found.unique(), _letters(), _groups()
    width = max(map(len, found.caught))
    yield "Wrong kernels, and the cases that catch them: # alone in its group, + with others of it."
    yield "At the end the dtypes in which they are caught: fp64, fp32, fp16, bf16."
    yield ""
    yield " " * width + "".join("  " + "".join(letters[case] for case in g) for g in groups)
    for name, cases in found.caught.items():
        marks = [
            "".join("." if c not in cases else "#" if name in unique[c] else "+" for c in group)
            for group in groups
        ]
        dtypes = [short for x, short in _SHORT.items() if any(x in d for d in cases.values())]
        yield f"{name:{width}}  {'  '.join(marks)}  {' '.join(dtypes)}"


def _legend(found: SelfTest) -> Iterator[str]:
    """Yield the cases by group, and what each alone catches, beginning with what fewest catch."""
    unique, letters = found.unique(), _letters()
    width = max(map(len, unique))
    yield "Cases, and what they are alone in their group to catch:"
    for group in _groups():
        yield ""
        for name in group:
            head = f"  {letters[name]}  {name:{width}}  "
            names = sorted(unique[name], key=lambda wrong: len(found.caught[wrong]))
            more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            text = ", ".join([*names[:_SHOWN], *more]) or "nothing"
            lines = wrap(text, _WIDTH - len(head))
            yield f"\n{' ' * len(head)}".join([head + lines[0], *lines[1:]])


def _missed(found: SelfTest) -> Iterator[str]:
    """Yield what the quick suite misses."""
    yield "The quick suite misses in its usual dtypes:"
    for name, dtypes in _USUAL.items():
        head = f"  {name} ({', '.join(dtypes)}): "
        yield from wrap(
            head + (", ".join(found.missed(dtypes)) or "none"), _WIDTH, subsequent_indent=" " * 4
        )


def _correct(found: SelfTest) -> Iterator[str]:
    """Yield the largest errors of correct kernels."""
    width = max(map(len, found.ratios))
    dtypes = list(next(iter(found.ratios.values())))
    seeds = f"{found.seeds} seeds" if found.seeds > 1 else "1 seed"
    yield f"Correct kernels, quick suite with {seeds}, and long keys: largest error / limit"
    yield ""
    yield " " * width + "".join(f"{dtype:>10}" for dtype in dtypes)
    for name, ratios in found.ratios.items():
        yield f"{name:{width}}" + "".join(f"{ratios[dtype]:10.2f}" for dtype in dtypes)


def _verdict(found: SelfTest) -> Iterator[str]:
    """Yield the counts, what is missing, and the verdict."""
    missed, idle = found.missed(), found.redundant()
    yield f"{len(found.caught) - len(missed)} of {len(found.caught)} wrong kernels are caught"
    yield from (f"  not caught: {name}" for name in missed)
    yield f"{len(CASES) - len(idle)} of {len(CASES)} cases are alone in their group to catch one"
    yield from (f"  never alone: {name}" for name in idle)
    yield f"{len(found.alarms)} false alarms"
    yield from (f"  {alarm}" for alarm in found.alarms)
    yield "passed" if found.passed else "FAILED"


def _letters() -> dict[str, str]:
    return dict(zip((case.name for case in CASES), ascii_letters + digits, strict=False))


def _groups() -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for case in CASES:
        groups.setdefault(case.group, []).append(case.name)
    return list(groups.values())
