"""How a task ended on one rank, and what all ranks' outcomes amount to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.call_kernel import ComplaintError
from lvxattn.check.shards import whole_of
from lvxattn.check.suite import attempt
from lvxattn.check.time_limit import TimeIsUpError

Array = npt.NDArray[np.float64]


class ElsewhereError(Exception):
    """Another rank failed, so that this one goes no further."""


class UnsupportedElsewhereError(NotImplementedError):
    """Another rank said that it cannot do this, so that this one does not either."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended on one rank.

    Attributes
    ----------
    status : str
        ``"ok"``; ``"error"``; ``"unsupported"``; ``"elsewhere"``, because another rank failed;
        ``"late"``, it did not come back in time; ``"silent"``, nor was the rank heard of.
    message : str
    results : dict
        float64 arrays by name: this rank's part.
    """

    status: str
    message: str = ""
    results: dict[str, Array] = field(default_factory=dict)


def outcome_of(work: Callable[[], dict[str, Array]]) -> Outcome:
    """Do the work and say how it ended."""
    told = ""

    def observed() -> dict[str, Array]:
        nonlocal told
        try:
            return work()
        except TimeIsUpError:
            told = "late"
            raise
        except (ElsewhereError, UnsupportedElsewhereError):
            told = "elsewhere"
            raise

    results, status, message = attempt(observed)
    return Outcome(told or status or "ok", message, results)


def raising(error: BaseException) -> Callable[[], Any]:
    """Return work that raises this."""

    def work() -> Any:
        raise error

    return work


def joined(outcomes: Sequence[Outcome], time_limit: float) -> dict[str, Array]:
    """Return the whole results.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Of all ranks, in rank order.
    time_limit : float
        What they were given, in seconds.

    Raises
    ------
    NotImplementedError
        Every rank says so.
    ComplaintError
        It names the ranks and what went wrong there.
    """
    statuses = {outcome.status for outcome in outcomes}
    if statuses == {"unsupported"}:
        raise NotImplementedError(outcomes[0].message)
    if statuses != {"ok"}:
        raise ComplaintError("; ".join(_complaints(outcomes, time_limit)))
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.results):
        missing = [r for r, outcome in enumerate(outcomes) if name not in outcome.results]
        if missing:
            raise ComplaintError(
                f"{name}: expected from all ranks or none, not returned by "
                f"{_named(missing, len(outcomes))}"
            )
    return whole_of([outcome.results for outcome in outcomes])


def _complaints(outcomes: Sequence[Outcome], time_limit: float) -> list[str]:
    """Say first what went wrong by itself, then who waited in vain."""
    P, said = len(outcomes), []

    def those(*statuses: str) -> list[int]:
        return [r for r, outcome in enumerate(outcomes) if outcome.status in statuses]

    texts: dict[tuple[str, str], list[int]] = {}
    for rank in those("error", "unsupported"):
        texts.setdefault((outcomes[rank].status, outcomes[rank].message), []).append(rank)
    for (status, message), found in sorted(texts.items()):
        text = message if status == "error" else f"unsupported there, not everywhere: {message}"
        said.append(f"{_named(found, P)}: {text}")
    if late := those("late", "silent"):
        text = f"{_named(late, P)} did not come back within {time_limit:g} s"
        back = those("ok")
        said.append(f"{text} ({_named(back, P)} did)" if back else text)
    return said or [outcomes[0].message]


def _named(found: Sequence[int], P: int) -> str:
    if len(found) == P and P > 1:
        return f"all {P} ranks"
    *most, last = map(str, found)
    return f"ranks {', '.join(most)} and {last} of {P}" if most else f"rank {last} of {P}"


def verdict_on(own: BaseException | None, statuses: Sequence[str]) -> BaseException | None:
    """Return what a rank is to raise so that all go on or none, given how all ranks fared.

    Parameters
    ----------
    own : exception or None
        What this rank's work raised.
    statuses : sequence of str
        ``"ok"``, ``"error"`` or ``"unsupported"`` of every rank.
    """
    refused = isinstance(own, NotImplementedError)
    if own is not None and not refused:
        return own
    if "error" in statuses:
        return ElsewhereError("another rank failed")
    if "unsupported" in statuses:
        return own or UnsupportedElsewhereError("another rank cannot do this")
    return None


def status_of(error: Any) -> str:
    """Return ``"ok"``, ``"error"`` or ``"unsupported"``."""
    if error is None:
        return "ok"
    return "unsupported" if isinstance(error, NotImplementedError) else "error"
