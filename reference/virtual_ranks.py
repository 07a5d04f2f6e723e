"""P ranks in one process: threads that exchange messages.

A `VirtualComm` has the few methods of a communicator that the reference needs.  Arrays that are
sent are copied, so that ranks share none; objects that are gathered are not copied, and must not be
changed.  A receive waits for its message.  When all ranks wait and no message can come, a deadlock
is raised.

    run_ranks(3, fn, *args)    fn(comm 0, *args)   fn(comm 1, *args)   fn(comm 2, *args)
                                     |  send, recv, allgather  |             |
                               [result 0,          result 1,           result 2]
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Result = TypeVar("Result")
T = TypeVar("T")


def run_ranks(
    P: int,
    fn: Callable[..., Result],
    *args: Any,
    wire_dtype: npt.DTypeLike | None = None,
    hosts: Sequence[str] | None = None,
    log: list["Message"] | None = None,
) -> list[Result]:
    """Run ``fn(comm, *args)`` on P virtual ranks.

    Parameters
    ----------
    P : int
    fn : callable
    *args
        The same objects for every rank: cut them with `shard`, or index them by ``comm.rank``.
    wire_dtype : dtype, optional
        Round every floating array that is sent to this dtype and back, to study the effect.
    hosts : sequence of str, optional
        The name of each rank's host; default: all on one.
    log : list, optional
        Every `Message` is appended to it, in the order of sending.

    Returns
    -------
    list
        The return value of each rank, in rank order.

    Raises
    ------
    Exception
        The first that a rank raised, with a note of the rank; it ends the other ranks at their next
        call of comm.
    RuntimeError
        Deadlock: all ranks wait, and no message can come.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import run_ranks
    >>> def shift(comm):
    ...     comm.send([np.array([comm.rank])], dest=(comm.rank + 1) % comm.size)
    ...     (received,) = comm.recv(source=(comm.rank - 1) % comm.size)
    ...     return int(received[0])
    >>> run_ranks(3, shift)
    [2, 0, 1]
    """
    if P < 1:
        raise ValueError(f"P: expected at least 1 rank, got {P}")
    if hosts is not None and len(hosts) != P:
        raise ValueError(f"hosts: expected one for each of {P} ranks, got {len(hosts)}")
    world = _World(P, None if wire_dtype is None else np.dtype(wire_dtype), log)
    results: list[Any] = [None] * P

    def body(rank: int) -> None:
        host = "virtual" if hosts is None else hosts[rank]
        try:
            results[rank] = fn(VirtualComm(rank, P, host, world), *args)
        except _Ended:
            pass
        except BaseException as error:
            error.add_note(f"raised on virtual rank {rank} of {P}")
            world.fail(error)
        finally:
            world.leave()

    threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(P)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # as KeyboardInterrupt
        world.fail(error)
        raise
    if world.failure is not None:
        raise world.failure
    return results


@dataclass(frozen=True)
class Message:
    """One message: its source and destination, its tag and its size in bytes.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import run_ranks
    >>> log = []
    >>> _ = run_ranks(2, lambda comm: comm.send([np.zeros(3)], 0) if comm.rank else None, log=log)
    >>> log
    [Message(source=1, dest=0, tag=0, nbytes=24)]
    """

    source: int
    dest: int
    tag: int
    nbytes: int


@dataclass(frozen=True)
class VirtualComm:
    """The communicator that `run_ranks` passes to each rank.

    Attributes
    ----------
    rank, size : int
    host : str

    Examples
    --------
    >>> from lvxattn.reference import run_ranks
    >>> run_ranks(2, lambda comm: (comm.rank, comm.size, comm.host, comm.allgather(comm.rank)))
    [(0, 2, 'virtual', [0, 1]), (1, 2, 'virtual', [0, 1])]
    """

    rank: int
    size: int
    host: str
    _world: "_World"

    def send(self, arrays: Sequence[Array], dest: int, tag: int = 0) -> None:
        """Send copies of arrays, without waiting for the receiver."""
        self._world.send(self.rank, dest, tag, arrays)

    def recv(self, source: int, tag: int = 0) -> list[Array]:
        """Wait for the oldest message from `source` with this tag, and return its arrays."""
        return self._world.recv(self.rank, source, tag)

    def allgather(self, sendobj: T) -> list[T]:
        """Return the objects of all ranks, in rank order.

        Collective: every rank calls this.
        """
        return self._world.allgather(self.rank, sendobj)


class _Ended(BaseException):
    """Ends a rank after another one has failed; never raised out of `run_ranks`."""


class _World:
    """The state that all ranks share: messages, pending allgathers, and waiting ranks."""

    def __init__(self, P: int, wire_dtype: np.dtype[Any] | None, log: list[Message] | None) -> None:
        self.changed = threading.Condition()
        self.wire_dtype = wire_dtype
        self.log = log
        self.alive = P
        self.P = P
        self.failure: BaseException | None = None
        self.mail: dict[tuple[int, int, int], deque[list[Array]]] = defaultdict(deque)
        self.meeting: dict[int, Any] = {}
        self.meetings: list[list[Any]] = []
        self.waiting: dict[int, tuple[Callable[[], bool], str]] = {}

    def send(self, source: int, dest: int, tag: int, arrays: Sequence[Array]) -> None:
        if not 0 <= dest < self.P:
            raise ValueError(f"dest: expected a rank below {self.P}, got {dest} (on rank {source})")
        copies = [self._on_the_wire(x) for x in arrays]
        with self.changed:
            self._end_if_failed()
            self.mail[source, dest, tag].append(copies)
            if self.log is not None:
                itemsize = self.wire_dtype.itemsize if self.wire_dtype else None
                nbytes = sum(x.size * (itemsize or x.itemsize) for x in copies)
                self.log.append(Message(source, dest, tag, nbytes))
            self.changed.notify_all()

    def recv(self, rank: int, source: int, tag: int) -> list[Array]:
        with self.changed:
            box = self.mail[source, rank, tag]
            self._wait(rank, lambda: len(box) > 0, f"a message from rank {source} with tag {tag}")
            return box.popleft()

    def allgather(self, rank: int, sendobj: T) -> list[T]:
        with self.changed:
            self._end_if_failed()
            number = len(self.meetings)
            self.meeting[rank] = sendobj
            if len(self.meeting) == self.P:
                self.meetings.append([self.meeting[r] for r in range(self.P)])
                self.meeting = {}
                self.changed.notify_all()
            self._wait(rank, lambda: len(self.meetings) > number, "all ranks to join an allgather")
            return list(self.meetings[number])

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def leave(self) -> None:
        with self.changed:
            self.alive -= 1
            self._look_for_deadlock()

    def _wait(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        self.waiting[rank] = ready, what
        self._look_for_deadlock()
        self.changed.wait_for(lambda: self.failure is not None or ready())
        del self.waiting[rank]
        self._end_if_failed()

    def _end_if_failed(self) -> None:
        if self.failure is not None:
            raise _Ended

    def _look_for_deadlock(self) -> None:
        if self.failure is not None or not self.waiting or len(self.waiting) < self.alive:
            return
        if not any(ready() for ready, _ in self.waiting.values()):
            waits = ", ".join(f"rank {r} for {w}" for r, (_, w) in sorted(self.waiting.items()))
            self.failure = RuntimeError(f"deadlock: every rank still running waits: {waits}")
            self.changed.notify_all()

    def _on_the_wire(self, x: Array) -> Array:
        if self.wire_dtype is None or not np.issubdtype(x.dtype, np.floating):
            return x.copy()
        return x.astype(self.wire_dtype).astype(x.dtype)
