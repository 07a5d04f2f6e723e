"""Run a reader's function on ranks, in time, and record what it sends.

    on_virtual_ranks    threads: results, and a log of all messages
    hops                processes of MPI: a function that moves a block one place to the right
    reductions          processes of MPI: a function as the operator of a reduction

A rank of MPI gets the cell that defines the function, and nothing else of the notebook.
"""

import ctypes
import linecache
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from lvxattn.reference import Message, VirtualComm, run_ranks

SECONDS = 20.0  # for all ranks, from their start
TIME_LIMIT = 3.0  # of a rank that waits for another


class AnswerError(AssertionError):
    """What is wrong with an answer."""


class SentMessages:
    """A communicator with `send` and `recv` only, which refuses to send without end."""

    def __init__(self, comm: VirtualComm, most: int) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._comm, self._most, self._sent = comm, most, 0

    def send(self, arrays: Sequence[Any], dest: int, tag: int = 0) -> None:
        """Send copies of arrays, without waiting for the receiver."""
        if not isinstance(arrays, list | tuple):
            raise AnswerError(f"comm.send takes a list of arrays, got {type(arrays).__name__}")
        self._sent += 1
        if self._sent > self._most:
            raise AnswerError(f"rank {self.rank} sent more than {self._most} messages")
        self._comm.send([np.asarray(x) for x in arrays], dest, tag)

    def recv(self, source: int, tag: int = 0) -> list[Any]:
        """Wait for the oldest message from `source` with this tag, and return its arrays."""
        return self._comm.recv(source, tag)

    def __getattr__(self, name: str) -> None:
        """Refuse other methods."""
        raise AnswerError(f"comm.{name} was used; expected comm.send and comm.recv alone")


def on_virtual_ranks(
    P: int, function: Callable[[SentMessages], Any], most: int, where: str
) -> tuple[list[Any], list[Message]]:
    """Run a function on virtual ranks.

    Parameters
    ----------
    P : int
    function : callable
        Takes the communicator.
    most : int
        Messages that a rank may send.
    where : str
        What the message of an error begins with.

    Returns
    -------
    list
        The result of each rank.
    list of Message

    Raises
    ------
    AnswerError
        A rank raised, the ranks wait for one another, or take too long.
    """
    log: list[Message] = []
    others = threading.enumerate()
    try:
        with time_limit(SECONDS / 4):
            results = run_ranks(P, lambda comm: function(SentMessages(comm, most)), log=log)
    except NotImplementedError:
        raise
    except Exception as error:
        _end([thread for thread in threading.enumerate() if thread not in others])
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise AnswerError(f"{where}: {kind}{error}") from None
    return results, log


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the context takes longer; in the main thread only."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Hop(NamedTuple):
    """What a rank did in one hop: the block it had, the one it got, and its calls of MPI."""

    block: Any
    room: Any
    calls: list[str]


def hops(function: Callable[..., Any], numbers: Sequence[int]) -> dict[int, list[Hop]]:
    """Run ``function(comm, block, room)`` once on every number of ranks.

    Blocks are random numbers, other ones on every rank and as many as there are ranks; rooms are
    NaN.  The communicator has `Ssend` and `Recv` only.

    Returns
    -------
    dict
        By number of ranks, what every rank did.

    Raises
    ------
    AnswerError
        A rank raised, or waits for longer than TIME_LIMIT.
    """
    program = "import exercise_ranks\nfound = exercise_ranks.hops_on_a_rank({name}, numbers)"
    return _on_mpi_ranks(function, program, max(numbers), numbers=list(numbers))


def reductions(function: Callable[..., Any], cases: dict[str, list[Any]]) -> dict[str, Any]:
    """Reduce rows of numbers with ``function(a, b)``, which leaves the joined rows in b.

    Parameters
    ----------
    function : callable
    cases : dict
        By name, an array (rows, width) for each rank; each case has as many.

    Returns
    -------
    dict
        By name, the reduced rows.

    Raises
    ------
    AnswerError
        A rank raised, or all together took too long.
    """
    program = "import exercise_ranks\nfound = exercise_ranks.reductions_on_a_rank({name}, cases)"
    ranks = max(map(len, cases.values()))
    return _on_mpi_ranks(function, program, ranks, cases=cases)


def hops_on_a_rank(function: Callable[..., Any], numbers: list[int]) -> dict[int, list[Hop]]:
    """Run `hops` on this rank of MPI.  Collective; the result is on rank 0."""
    from mpi4py import MPI

    world, found = MPI.COMM_WORLD, {}
    for P in numbers:
        part = world.Split(int(world.rank < P))
        mine, wrong = None, ""
        if world.rank < P:
            block = np.random.default_rng(int.from_bytes(os.urandom(8))).random(P)
            kept, room = block.copy(), np.full(P, np.nan)
            part.Barrier()
            comm = WatchedComm(part)
            try:
                function(comm, block, room)
            except Exception as error:
                wrong = _told(error)
            if not wrong and not np.array_equal(block, kept):
                wrong = f"rank {part.rank} has changed its block"
            mine = Hop(kept, room, comm.calls)
        told, steps = world.gather(wrong), world.gather(mine)
        _agree(world, f"on {P} ranks", told or [])
        found[P] = (steps or [])[:P]
    return found


def reductions_on_a_rank(
    function: Callable[..., Any], cases: dict[str, list[Any]]
) -> dict[str, Any]:
    """Run `reductions` on this rank of MPI.  Collective."""
    from mpi4py import MPI

    world, found = MPI.COMM_WORLD, {}
    for name, rows in cases.items():
        mine = np.ascontiguousarray(rows[world.rank])
        width, wrong = mine.shape[1], ""

        def join(a: Any, b: Any, _: Any, width: int = width) -> None:
            nonlocal wrong
            try:
                with np.errstate(all="ignore"):  # the result shows what matters
                    function(*(np.frombuffer(x).reshape(-1, width) for x in (a, b)))
            except Exception as error:  # MPI would end all ranks
                wrong = wrong or _told(error)

        joined, row = np.empty_like(mine), MPI.DOUBLE.Create_contiguous(width).Commit()
        operator = MPI.Op.Create(join, commute=True)
        world.Allreduce([mine, len(mine), row], [joined, len(mine), row], operator)
        _agree(world, name, world.gather(wrong) or [])
        found[name] = joined
    return found


class WatchedComm:
    """A communicator with `Ssend` and `Recv` only, which records them and ends a deadlock."""

    def __init__(self, comm: Any) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.calls: list[str] = []
        self._comm, self._end = comm, time.monotonic() + TIME_LIMIT

    def Ssend(self, buf: Any, dest: int, tag: int = 0) -> None:
        """Send, and wait until the receiver receives."""
        self._expect_rank(dest, "Ssend to")
        self._wait(self._comm.Issend(buf, dest, tag), f"Ssend to rank {dest}")

    def Recv(self, buf: Any, source: int | None = None) -> None:
        """Receive; by default, from any rank."""
        if source is None:
            self._wait(self._comm.Irecv(buf), "Recv from any rank")
        else:
            self._expect_rank(source, "Recv from")
            self._wait(self._comm.Irecv(buf, source), f"Recv from rank {source}")

    def _expect_rank(self, rank: int, call: str) -> None:
        if not 0 <= rank < self.size:
            raise AnswerError(
                f"rank {self.rank} called {call} rank {rank}; there is no rank {rank}"
            )

    def _wait(self, request: Any, call: str) -> None:
        self.calls.append(call)
        while not request.Test():
            if time.monotonic() > self._end:
                raise AnswerError(
                    f"rank {self.rank} was still waiting in {call} after {TIME_LIMIT:g} s"
                )
            time.sleep(0.001)

    def __getattr__(self, name: str) -> None:
        """Refuse other methods."""
        raise AnswerError(f"comm.{name} was used; expected comm.Ssend and comm.Recv alone")


def _end(threads: list[threading.Thread]) -> None:
    """End threads that would run for ever."""
    for thread in threads:
        if thread.ident is not None:
            which, how = ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(which, how)


def _on_mpi_ranks(function: Callable[..., Any], program: str, ranks: int, **take: Any) -> Any:
    from lvxattn.mpi_impl.jupyter import CellError, run_cell  # here, as it needs MPI

    cell = "".join(linecache.getlines(function.__code__.co_filename))
    source = f"{cell}\n{program.format(name=function.__name__)}\n"
    try:
        ran = run_cell(source, ranks, timeout=SECONDS, take=take, give=["found"])
    except CellError as error:
        _, _, wrong = str(error).rpartition(f"{AnswerError.__name__}: ")
        raise AnswerError(wrong.strip()) from None
    return ran.given["found"]


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, AnswerError) else f"{type(error).__name__}: {error}"


def _agree(world: Any, where: str, told: list[str]) -> None:
    """Raise what is wrong on rank 0, which ends all ranks: they may be waiting for one another."""
    if wrong := list(dict.fromkeys(filter(None, told))):
        raise AnswerError(f"{where}: {', '.join(wrong)}")
    world.Barrier()
