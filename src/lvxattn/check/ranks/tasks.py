"""Tasks on ranks: what runs them, how one ended on each rank, and the joined results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lvxattn.check.error_location import failure_of
from lvxattn.check.one_call import BackwardError, ContractError, Together
from lvxattn.check.shards import join_parts
from lvxattn.check.time_limit import TimeIsUpError

Array = npt.NDArray[np.float64]

# task(comm, rank, together): the work of one rank, with a communicator of the ranks that do it;
# returns results and notes.
Task = Callable[[Any, int, Together], tuple[dict[str, Array], Sequence[str]]]


@dataclass(frozen=True)
class Outcome:
    """How a task ended on one rank.

    Attributes
    ----------
    status : str
        ``"ok"``; ``"error"``; ``"unsupported"``; ``"elsewhere"``: another rank failed; ``"late"``:
        it exceeded the time limit; ``"silent"``: the rank sent nothing, either.
    message : str
    results : dict
        float64 arrays by name: this rank's part; those of the forward if only the backward failed.
    notes : sequence of str
        Why there are no gradients.
    """

    status: str
    message: str = ""
    results: dict[str, Array] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Ranks(Protocol):
    """Ranks that run tasks.

    Attributes
    ----------
    rank, size : int
        Of this process: rank 0 judges.
    time_limit : float
        Seconds per task.
    device : str or None
        Of this rank's arrays, if ranks differ in it.
    stuck : bool
        Whether a task did not return on some rank: nothing else can run.
    groups : tuple of str
        The kinds of groups that tasks can run on: some of `sweep.GROUPS`.
    """

    rank: int
    size: int
    time_limit: float
    device: str | None
    stuck: bool
    groups: tuple[str, ...]

    def agree(self, what: tuple[Any, ...]) -> None:
        """Validate that all ranks were called with the same arguments.

        Collective: every rank calls this.

        Raises
        ------
        ValueError
            They differ; the same on all ranks.
        """

    def share(self, what: Any) -> Any:
        """Return rank 0's object on every rank.

        Collective: every rank calls this.
        """

    def run(self, group: Sequence[int], task: Task) -> list[Outcome]:
        """Run a task on a group of ranks, given in its order, each within the time limit.

        Collective: every rank calls this, also those that do not take part.

        Returns
        -------
        list of Outcome
            On rank 0, also if it does not take part, one for each rank of the group; elsewhere
            empty.
        """

    def end(self) -> None:
        """End all ranks with status 1.  Does not return."""

    def close(self) -> None:
        """Free the resources of the ranks.

        Collective: every rank calls this, unless a rank is stuck.
        """


class ElsewhereError(Exception):
    """Another rank failed, so this one stops."""


class UnsupportedElsewhereError(NotImplementedError):
    """The problem is unsupported on another rank, so this one stops."""


def outcome_of(work: Callable[[], tuple[dict[str, Array], Sequence[str]]]) -> Outcome:
    """Do the work; return its outcome."""
    try:
        return Outcome("ok", "", *work())
    except BaseException as error:
        return failed(error)


def failed(error: BaseException) -> Outcome:
    """Return the outcome of a task that raised; a KeyboardInterrupt is raised again."""
    status, message = failure_of(error)
    cause = error.__cause__ if isinstance(error, BackwardError) else error
    if isinstance(cause, TimeIsUpError):
        status = "late"
    elif isinstance(cause, ElsewhereError | UnsupportedElsewhereError):
        status = "elsewhere"
    return Outcome(status, message, getattr(error, "results", {}))


def joined(outcomes: Sequence[Outcome], time_limit: float) -> dict[str, Array]:
    """Return the joined results of all ranks.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Of all ranks, in rank order.
    time_limit : float
        In seconds, for the message.

    Raises
    ------
    NotImplementedError
        The problem is unsupported on every rank.
    ContractError
        A rank failed; names the ranks and their errors.
    """
    statuses = {outcome.status for outcome in outcomes}
    if statuses == {"unsupported"}:
        raise NotImplementedError(outcomes[0].message)
    if statuses != {"ok"}:
        parts = [outcome.results for outcome in outcomes]
        everywhere = [name for name in parts[0] if all(name in part for part in parts)]
        forward = join_parts([{name: part[name] for name in everywhere} for part in parts])
        raise ContractError("; ".join(_failures(outcomes, time_limit)), forward)
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.results):
        missing = [r for r, outcome in enumerate(outcomes) if name not in outcome.results]
        if missing:
            raise ContractError(
                f"{name}: expected from all ranks or none, not returned by "
                f"{_named(missing, len(outcomes))}"
            )
    return join_parts([outcome.results for outcome in outcomes])


def _failures(outcomes: Sequence[Outcome], time_limit: float) -> list[str]:
    """Describe the errors first, then the ranks that waited for others."""
    P, lines = len(outcomes), []

    def those(*statuses: str) -> list[int]:
        return [r for r, outcome in enumerate(outcomes) if outcome.status in statuses]

    texts: dict[tuple[str, str], list[int]] = {}
    for rank in those("error", "unsupported"):
        texts.setdefault((outcomes[rank].status, outcomes[rank].message), []).append(rank)
    for (status, message), found in sorted(texts.items()):
        text = message if status == "error" else f"unsupported there, not everywhere: {message}"
        lines.append(f"{_named(found, P)}: {text}")
    if late := those("late", "silent"):
        text = f"{_named(late, P)} did not come back within {time_limit:g} s"
        back = those("ok")
        lines.append(f"{text} ({_named(back, P)} did)" if back else text)
    return lines or [outcomes[0].message]


def _named(found: Sequence[int], P: int) -> str:
    if len(found) == P and P > 1:
        return f"all {P} ranks"
    *most, last = map(str, found)
    return f"ranks {', '.join(most)} and {last} of {P}" if most else f"rank {last} of {P}"


def error_to_raise(own: BaseException | None, statuses: Sequence[str]) -> BaseException | None:
    """Return the error that a rank must raise so that all ranks go on or none, if any.

    Parameters
    ----------
    own : exception or None
        The error of this rank's work.
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
