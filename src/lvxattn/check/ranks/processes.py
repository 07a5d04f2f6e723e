"""Ranks that are processes, kept in step even if the function fails or hangs on some of them.

Their messages go over a channel of their own, where no wait is unlimited:

    rank 0       START -->  run  <-- OUTCOME   ORDER -->   judge   START -->  ...
    others       --> START  run  OUTCOME -->   --> ORDER   wait    --> START

Within a task the ranks MEET after every call: if it raised on one, none goes on to the next.  If
one raises while others wait for it inside the function, these exceed the time limit.  Their threads
cannot be ended, nor their communicators reused: the order is then to stop, rank 0 reports, and all
processes end.
"""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lvxattn.check.ranks.tasks import (
    Outcome,
    Task,
    error_to_raise,
    failed,
    outcome_of,
    status_of,
)
from lvxattn.check.surroundings import call_watched
from lvxattn.check.sweep import GROUPS
from lvxattn.check.time_limit import TimeLimit

START, OUTCOME, ORDER, MEET, MET, SHARE = 7101, 7102, 7103, 7104, 7105, 7106
# Seconds between two messages of a rank, besides its task.
SLACK = 10.0
# Seconds in which rank 0 judges a case.
JUDGING = 600.0


class SilentError(Exception):
    """A rank sent no message in time."""


class Processes(ABC):
    """The processes that a launcher started; implements `tasks.Ranks`.

    A subclass implements the channel, the communicators and the end of all processes.
    """

    device: str | None = None
    groups: tuple[str, ...] = GROUPS

    def __init__(self, rank: int, size: int, time_limit: float) -> None:
        self.rank, self.size, self.time_limit = rank, size, time_limit
        self.stuck = False
        self._timer = TimeLimit(time_limit)
        self._comms: dict[tuple[int, ...], Any] = {}
        self._error: BaseException | None = None

    def agree(self, what: tuple[Any, ...]) -> None:
        """Compare the arguments of all ranks.  Collective: every rank calls this."""
        self._send(what, 0, MEET)
        if self.rank == 0:
            given = [self._receive(rank, MEET, JUDGING) for rank in range(self.size)]
            odd = [rank for rank, other in enumerate(given) if other != what]
            text = f"expected rank 0's arguments {what} on every rank, rank {odd[0]} has " \
                   f"{given[odd[0]]}" if odd else ""  # fmt: skip
            self._send_all(text, MET)
        if text := self._receive(0, MET, JUDGING + SLACK):
            raise ValueError(text)

    def share(self, what: Any) -> Any:
        """Return rank 0's object.  Collective: every rank calls this."""
        if self.rank == 0:
            self._send_all(what, SHARE)
        return self._listen(SHARE, self.time_limit + JUDGING)

    def run(self, group: Sequence[int], task: Task) -> list[Outcome]:
        """Run a task on a group of ranks.  Collective: every rank calls this."""
        group = tuple(group)
        if self.rank == 0:
            self._send_all(None, START)
        self._listen(START, self.time_limit + JUDGING)
        if group not in self._comms:
            self._comms[group] = self._split(group)
        start = time.monotonic()
        if self.rank in group:
            self._send(self._attempt(group, task), 0, OUTCOME)
        outcomes: list[Outcome] = []
        if self.rank == 0:
            outcomes = [self._outcome(rank, start) for rank in group]
            statuses = {outcome.status for outcome in outcomes}
            self.stuck = not statuses.isdisjoint(("late", "silent")) or self._timer.abandoned > 0
            self._send_all((self.stuck, statuses != {"ok"}), ORDER)
        since = time.monotonic() - start
        self.stuck, renew = self._listen(ORDER, self.time_limit + 2 * SLACK - since)
        if self.stuck and self.rank:
            time.sleep(SLACK)  # rank 0 reports first, and ends this process too
            self.end()
        if renew and not self.stuck:  # messages may still be under way
            self._free(self._comms.pop(group))
        return outcomes

    def close(self) -> None:
        """Free the communicators.  Collective: every rank calls this."""
        self._timer.close()
        for comm in self._comms.values():
            self._free(comm)
        self._comms.clear()

    def end(self) -> None:
        """End all processes; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._abort()
        os._exit(1)

    def _attempt(self, group: tuple[int, ...], task: Task) -> Outcome:
        """Run the task here; an error has precedence over a later wait for other ranks."""
        comm, self._error = self._comms[group], None
        rank = group.index(self.rank)

        def together(work: Callable[[], Any]) -> Any:
            return self._together(work, group)

        def work() -> Any:
            with self._inside():
                return call_watched(lambda: task(comm, rank, together))

        outcome = outcome_of(lambda: self._timer.call(work))
        error = self._error
        if outcome.status == "late" and error is not None:
            return failed(error)
        return outcome

    def _together(self, work: Callable[[], Any], group: tuple[int, ...]) -> Any:
        """Do the work, then exchange its status; runs within the task's time limit."""
        self._error, result = None, None
        try:
            result = work()
        except Exception as error:
            self._error = error
        first = group[0]
        self._send(status_of(self._error), first, MEET)
        if self.rank == first:
            met = [self._receive(rank, MEET, None) for rank in group]
            for rank in group:
                self._send(met, rank, MET)
        raised = error_to_raise(self._error, self._receive(first, MET, None))
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
        """Return a message of rank 0; if none comes, end."""
        try:
            return self._receive(0, tag, seconds)
        except SilentError as error:
            sys.stderr.write(f"rank {self.rank}: {error}\n")
            self.end()

    def _send_all(self, message: Any, tag: int) -> None:
        for rank in range(self.size):
            self._send(message, rank, tag)

    def _receive(self, source: int, tag: int, seconds: float | None) -> Any:
        """Wait for a message; seconds=None waits until the thread is interrupted."""
        start, nap = time.monotonic(), 2e-5
        while not self._arrived(source, tag):
            if seconds is not None and time.monotonic() - start > seconds:
                raise SilentError(f"rank {source} sent no message for {seconds:.0f} s")
            time.sleep(nap)
            nap = min(2 * nap, 5e-3)
        return self._take(source, tag)

    def _inside(self) -> AbstractContextManager[Any]:
        """Return the context of a task in its thread."""
        return nullcontext()

    @abstractmethod
    def _send(self, message: Any, dest: int, tag: int) -> None:
        """Send an object, also to oneself; returns at once."""

    @abstractmethod
    def _arrived(self, source: int, tag: int) -> bool:
        """Whether a message has arrived."""

    @abstractmethod
    def _take(self, source: int, tag: int) -> Any:
        """Return the message that has arrived."""

    @abstractmethod
    def _split(self, group: tuple[int, ...]) -> Any:
        """Return a new communicator of these ranks, in this order.

        Collective: every rank calls this.
        """

    @abstractmethod
    def _free(self, comm: Any) -> None:
        """Free a communicator."""

    @abstractmethod
    def _abort(self) -> None:
        """End the processes of all ranks, if possible."""
