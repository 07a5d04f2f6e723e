"""The arguments of a check, validated before anything is called."""

from collections.abc import Iterable
from typing import Any

from lvxattn.check.call_kernel import backward_of
from lvxattn.check.cases import DTYPES, Case, suite_of
from lvxattn.check.frameworks import Framework


def check_arguments(
    fn: Any, suite: str, backward: Any, seeds: Any, time_limit: Any, cases: Any = None
) -> None:
    """Validate arguments of `check`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what was given.
    """
    if not callable(fn) and not isinstance(fn, str):
        raise TypeError(f"fn: expected a function, got {type(fn).__name__} {fn!r:.40}")
    suite_of(suite)
    if not isinstance(backward, bool | str) and not callable(backward):
        raise TypeError(f"backward: expected True, False or a function, got {backward!r:.40}")
    backward_of(fn, backward)
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
    """Return the dtypes to check; by default also ones that are unavailable, which are noted.

    Raises
    ------
    TypeError, ValueError
        dtypes is not a sequence of available dtypes.
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
