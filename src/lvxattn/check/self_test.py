"""The oracle, tried on kernels that are known to be wrong or right.

Every wrong kernel must be caught by some case; every case must be, in its group, the only one to
catch some wrong kernel; right kernels must raise no alarm.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from lvxattn.check.call_kernel import call_kernel
from lvxattn.check.cases import CASES
from lvxattn.check.correct_kernels import correct_kernels
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.judge import RESULTS, Truth, ratio_of, truth_for
from lvxattn.check.matrix import SelfTest
from lvxattn.check.problem import Problem, draw
from lvxattn.check.suite import attempt
from lvxattn.check.wrong import WRONG


def self_test(*, seeds: int = 2, path: str | None = None) -> SelfTest:
    """Try the oracle on wrong kernels and on right ones.

    Parameters
    ----------
    seeds : int
        How many problems of each case of the quick suite the right kernels get, in every dtype.
    path : str, optional
        Of a Markdown file to write the outcome into.

    Returns
    -------
    SelfTest

    Raises
    ------
    ValueError
        There are no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    ratios, alarms = play_right(seeds)
    found = SelfTest(play_wrong(), ratios, alarms, seeds)
    if path is not None:
        write_matrix(found, path)
    return found


def play_wrong(
    dtypes: Sequence[str] | None = None, names: Iterable[str] = tuple(WRONG)
) -> dict[str, dict[str, list[str]]]:
    """Return, by wrong kernel, by case that catches it, the dtypes in which it does.

    Parameters
    ----------
    dtypes : sequence of str, optional
        All, unless given.
    names : iterable of str
        Which wrong kernels, all unless given.
    """
    numpy = framework_of("numpy")
    caught: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for case in CASES:
        for dtype in dtypes or numpy.dtypes:
            problem, truth = draw(case, dtype), truth_for(case, dtype, 0)
            for name, cases in caught.items():
                if not _worst(WRONG[name](), numpy, problem, truth) <= 1:
                    cases.setdefault(case.name, []).append(dtype)
    return caught


def play_right(seeds: int) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Return the largest errors of right kernels over their limits, and where that is above 1.

    Parameters
    ----------
    seeds : int
        How many problems of each case of the quick suite; of the longer ones there is one.
    """
    dtypes = framework_of("numpy").dtypes
    ratios = {style.name: dict.fromkeys(dtypes, 0.0) for style in correct_kernels()}
    alarms = []
    for case in CASES:
        for seed in range(seeds if case.quick else 1):
            for dtype in dtypes:
                problem, truth = draw(case, dtype, seed), truth_for(case, dtype, seed)
                for style in correct_kernels():
                    ratio = _worst(style.make(), style.framework, problem, truth)
                    ratios[style.name][dtype] = max(ratios[style.name][dtype], ratio)
                    if not ratio <= 1:
                        where = f"{style.name}: {case.name}, {dtype}, seed {seed}"
                        alarms.append(f"{where}: {ratio:.2f} of the limit")
    return ratios, tuple(alarms)


def write_matrix(found: SelfTest, path: str) -> None:
    """Write the outcome of a self-test into a Markdown file.

    Parameters
    ----------
    found : SelfTest
    path : str
    """
    text = [
        "# The oracle, tried on itself",
        "",
        "Written by `python -m lvxattn.check self-test`, in which every wrong kernel",
        "plays every case, in every dtype, seed 0, and kernels that are right in other ways",
        f"play the quick suite with {found.seeds} seeds.",
        "",
        f"```text\n{found}\n```",
    ]
    Path(path).write_text("\n".join(text) + "\n")


def _worst(fn: Callable[..., Any], framework: Framework, problem: Problem, truth: Truth) -> float:
    """Return a function's largest error over its limit; infinity if it ends otherwise."""
    backward = getattr(fn, "backward", None)
    work = partial(call_kernel, fn, problem, framework, backward=backward, gradients=True)
    results, status, _ = attempt(work)
    if status:
        return inf
    return max(ratio_of(x, results[x], problem, truth) for x in RESULTS if x in results)
