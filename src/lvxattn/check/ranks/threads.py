"""Virtual ranks: threads of this process, with a new communicator for every task.

An error on one rank ends the others at their next call of the communicator, and deadlocks are
detected, so that no function can end the check.
"""

from collections.abc import Sequence
from operator import call
from typing import Any

from lvxattn.check.ranks.tasks import Outcome, Task, failed
from lvxattn.check.time_limit import EndedError, TimeLimit


class VirtualRanks:
    """P threads of this process; implements `tasks.Ranks`."""

    rank = 0
    device: str | None = None
    stuck = False
    # A rank of a thread is its rank in the group: there is no other one that could be mistaken.
    groups: tuple[str, ...] = ("first",)

    def __init__(self, P: int, time_limit: float) -> None:
        if P < 1:
            raise ValueError(f"ranks: expected at least 1, got {P}")
        self.size, self.time_limit = P, time_limit
        self._timers = [TimeLimit(time_limit) for _ in range(P)]

    def agree(self, what: tuple[Any, ...]) -> None:
        """Do nothing: there is only one caller."""

    def share(self, what: Any) -> Any:
        """Return the object: there is only one caller."""
        return what

    def run(self, group: Sequence[int], task: Task) -> list[Outcome]:
        """Run a task on as many threads."""
        # Imported now: the oracle itself depends on no implementation.
        from lvxattn.reference.virtual_ranks import run_ranks

        P = len(group)
        failures: list[BaseException | None] = [None] * P
        ended = Outcome("elsewhere", "another rank failed")
        outcomes = [ended] * P

        def body(comm: Any) -> None:
            try:
                found = self._timers[comm.rank].call(lambda: task(comm, comm.rank, call))
                outcomes[comm.rank] = Outcome("ok", "", *found)
            except NotImplementedError as error:  # the others may be about to raise it, too
                outcomes[comm.rank] = Outcome("unsupported", str(error))
            except EndedError as error:
                cause = error.__cause__
                if cause is not None and not isinstance(cause, SystemExit | KeyboardInterrupt):
                    raise cause from None  # run_ranks ends this rank because of another one
                failures[comm.rank] = error
                raise
            except BaseException as error:
                failures[comm.rank] = error
                raise

        try:
            run_ranks(P, body)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            for rank, failure in enumerate(failures):
                # A rank ended because of another one raises no Exception.
                if failure is error or isinstance(failure, Exception):
                    outcomes[rank] = failed(failure)
            if error not in failures:  # a deadlock is raised by no rank and concerns all
                deadlock = failed(error)
                outcomes = [deadlock if outcome is ended else outcome for outcome in outcomes]
        return outcomes

    def end(self) -> None:
        """Never called: nothing is ever stuck."""
        raise AssertionError

    def close(self) -> None:
        """End the threads."""
        for timer in self._timers:
            timer.close()
