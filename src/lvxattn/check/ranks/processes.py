"""Ranks that are processes: how they keep together whatever the function does to them.

What they tell one another goes over a channel of their own, where nothing waits without end:

    rank 0       START -->  run  <-- OUTCOME   ORDER -->   judge   START -->  ...
    others       --> START  run  OUTCOME -->   --> ORDER   wait    --> START

Within a task the ranks MEET after every call: if one's raised, none goes on to the next.  One that
raises while the others wait for it inside the function leaves them there until the time limit.
Their threads cannot be ended, nor can what they use be used again: the order is then to stop, rank
0 says what there is to say, and all processes end.
"""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lvxattn.check.ranks.outcome import (
    Outcome,
    outcome_of,
    raising,
    status_of,
    verdict_on,
)
from lvxattn.check.ranks.ranks import Task
from lvxattn.check.time_limit import TimeLimit

START, OUTCOME, ORDER, MEET, MET = 7101, 7102, 7103, 7104, 7105
# Seconds that ranks may be apart: what one of them does between two messages besides its task.
SLACK = 10.0
# Seconds that rank 0 may judge a case.
JUDGING = 600.0


class SilentError(Exception):
    """A rank was not heard of in time."""


class Processes(ABC):
    """The processes that a launcher started; `ranks.ranks.Ranks`.

    A subclass has the channel, the communicators and the end.
    """

    device: str | None = None

    def __init__(self, rank: int, size: int, time_limit: float) -> None:
        self.rank, self.size, self.time_limit = rank, size, time_limit
        self.stuck = False
        self._patience = TimeLimit(time_limit)
        self._comms: dict[int, Any] = {}
        self._trouble: BaseException | None = None

    def agree(self, what: tuple[Any, ...]) -> None:
        """Compare what all ranks were called with.  Collective: every rank calls this."""
        self._send(what, 0, MEET)
        if self.rank == 0:
            said = [self._receive(rank, MEET, JUDGING) for rank in range(self.size)]
            odd = [rank for rank, other in enumerate(said) if other != what]
            text = f"expected rank 0's arguments {what} on every rank, rank {odd[0]} has " \
                   f"{said[odd[0]]}" if odd else ""  # fmt: skip
            self._tell(text, MET)
        if text := self._receive(0, MET, JUDGING + SLACK):
            raise ValueError(text)

    def run(self, P: int, task: Task) -> list[Outcome]:
        """Run a task on the first P ranks.  Collective: every rank calls this."""
        if self.rank == 0:
            self._tell(None, START)
        self._listen(START, self.time_limit + JUDGING)
        if P not in self._comms:
            self._comms[P] = self._split(P)
        start = time.monotonic()
        if self.rank < P:
            self._send(self._attempt(P, task), 0, OUTCOME)
        outcomes: list[Outcome] = []
        if self.rank == 0:
            outcomes = [self._outcome(rank, start) for rank in range(P)]
            statuses = {outcome.status for outcome in outcomes}
            self.stuck = not statuses.isdisjoint(("late", "silent")) or self._patience.abandoned > 0
            self._tell((self.stuck, statuses != {"ok"}), ORDER)
        since = time.monotonic() - start
        self.stuck, renew = self._listen(ORDER, self.time_limit + 2 * SLACK - since)
        if self.stuck and self.rank:
            time.sleep(SLACK)  # rank 0 has something to say first, and ends this process too
            self.end()
        if renew and not self.stuck:  # something may still be under way
            self._free(self._comms.pop(P))
        return outcomes

    def close(self) -> None:
        """Free the communicators.  Collective: every rank calls this."""
        self._patience.close()
        for comm in self._comms.values():
            self._free(comm)
        self._comms.clear()

    def end(self) -> None:
        """End all processes; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._abort()
        os._exit(1)

    def _attempt(self, P: int, task: Task) -> Outcome:
        """Run the task here; an error is told even if the rank then waited for the others."""
        comm, self._trouble = self._comms[P], None

        def together(work: Callable[[], Any]) -> Any:
            return self._together(work, P)

        def work() -> Any:
            with self._inside():
                return task(comm, self.rank, together)

        outcome = outcome_of(lambda: self._patience.call(work))
        trouble = self._trouble
        if outcome.status == "late" and trouble is not None:
            return outcome_of(raising(trouble))
        return outcome

    def _together(self, work: Callable[[], Any], P: int) -> Any:
        """Do the work, then hear how the others fared; runs within the task's time limit."""
        self._trouble, result = None, None
        try:
            result = work()
        except Exception as error:
            self._trouble = error
        self._send(status_of(self._trouble), 0, MEET)
        if self.rank == 0:
            met = [self._receive(rank, MEET, None) for rank in range(P)]
            for rank in range(P):
                self._send(met, rank, MET)
        raised = verdict_on(self._trouble, self._receive(0, MET, None))
        if raised is not None:
            raise raised
        return result

    def _outcome(self, rank: int, start: float) -> Outcome:
        since = time.monotonic() - start
        try:
            outcome: Outcome = self._receive(rank, OUTCOME, self.time_limit + SLACK - since)
        except SilentError as error:
            return Outcome("silent", str(error))
        return outcome

    def _listen(self, tag: int, seconds: float) -> Any:
        """Return what rank 0 says; if it says nothing, end."""
        try:
            return self._receive(0, tag, seconds)
        except SilentError as error:
            sys.stderr.write(f"rank {self.rank}: {error}\n")
            self.end()

    def _tell(self, message: Any, tag: int) -> None:
        for rank in range(self.size):
            self._send(message, rank, tag)

    def _receive(self, source: int, tag: int, seconds: float | None) -> Any:
        """Wait for a message; None waits until the thread is interrupted."""
        start, nap = time.monotonic(), 2e-5
        while not self._arrived(source, tag):
            if seconds is not None and time.monotonic() - start > seconds:
                raise SilentError(f"rank {source} was not heard of for {seconds:.0f} s")
            time.sleep(nap)
            nap = min(2 * nap, 5e-3)
        return self._take(source, tag)

    def _inside(self) -> AbstractContextManager[Any]:
        """Return what a task runs in, in its thread."""
        return nullcontext()

    @abstractmethod
    def _send(self, message: Any, dest: int, tag: int) -> None:
        """Send an object, also to oneself; returns at once."""

    @abstractmethod
    def _arrived(self, source: int, tag: int) -> bool:
        """Whether a message is there."""

    @abstractmethod
    def _take(self, source: int, tag: int) -> Any:
        """Return the message that is there."""

    @abstractmethod
    def _split(self, P: int) -> Any:
        """Return a new communicator of the first P ranks.  Collective: every rank calls this."""

    @abstractmethod
    def _free(self, comm: Any) -> None:
        """Give a communicator back."""

    @abstractmethod
    def _abort(self) -> None:
        """End the processes of all ranks, if this one can."""
