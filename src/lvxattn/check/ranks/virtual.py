"""Virtual ranks: threads of this process, a new communicator for every task.

An error on one rank ends the others at their next call of the communicator, and a wait for what
nobody sends is noticed, so that nothing that a function does is the end of the check.
"""

from typing import Any

from lvxattn.check.call_kernel import alone
from lvxattn.check.ranks.outcome import Outcome, outcome_of, raising
from lvxattn.check.ranks.ranks import Task
from lvxattn.check.time_limit import EndedError, TimeLimit
from lvxattn.reference.virtual_ranks import VirtualComm, run_ranks


class VirtualRanks:
    """P threads of this process; `ranks.ranks.Ranks`."""

    rank = 0
    device: str | None = None
    stuck = False

    def __init__(self, P: int, time_limit: float) -> None:
        if P < 1:
            raise ValueError(f"ranks: expected at least 1, got {P}")
        self.size = P
        self._patience = [TimeLimit(time_limit) for _ in range(P)]

    def agree(self, what: tuple[Any, ...]) -> None:
        """Do nothing: there is one caller."""

    def run(self, P: int, task: Task) -> list[Outcome]:
        """Run a task on P threads."""
        failures: list[BaseException | None] = [None] * P
        ended = Outcome("elsewhere", "another rank failed")
        outcomes = [ended] * P

        def body(comm: VirtualComm) -> None:
            try:
                results = self._patience[comm.rank].call(lambda: task(comm, comm.rank, alone))
                outcomes[comm.rank] = Outcome("ok", results=results)
            except NotImplementedError as error:  # the others may be about to say the same
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
                # What ends a rank because of another one is no Exception.
                if failure is error or isinstance(failure, Exception):
                    outcomes[rank] = outcome_of(raising(failure))
            if error not in failures:  # a deadlock is raised by nobody and concerns all
                deadlock = outcome_of(raising(error))
                outcomes = [deadlock if outcome is ended else outcome for outcome in outcomes]
        return outcomes

    def end(self) -> None:
        """Never called: nothing is ever stuck."""
        raise AssertionError

    def close(self) -> None:
        """End the threads."""
        for patience in self._patience:
            patience.close()
