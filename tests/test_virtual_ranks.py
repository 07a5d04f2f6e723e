"""Virtual ranks: messages, errors and deadlocks."""

import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from lvxattn.reference import Message, VirtualComm, run_ranks

LOG_DTYPES = [("float32", 4), ("float16", 2)]


@pytest.mark.parametrize("P", [1, 2, 3, 5, 7, 32])
def test_results_come_in_rank_order(P: int) -> None:
    def fn(comm: VirtualComm, word: str) -> tuple[int, int, str]:
        time.sleep(0.01 * (comm.rank % 2 == 0))
        return comm.rank, comm.size, word

    assert run_ranks(P, fn, "same") == [(rank, P, "same") for rank in range(P)]


def test_messages_are_ordered_by_source_and_tag() -> None:
    def fn(comm: VirtualComm) -> Any:
        if comm.rank < 2:
            for i in range(3):
                comm.send([np.array(10 * comm.rank + i)], 2, tag=i % 2)
            return None
        return [int(comm.recv(source, tag)[0]) for source in (1, 0) for tag in (1, 0, 0)]

    assert run_ranks(3, fn)[2] == [11, 10, 12, 1, 0, 2]


def test_message_holds_any_number_of_arrays() -> None:
    arrays = [np.arange(6.0).reshape(2, 3)[:, ::2], np.zeros((0, 4), np.float32), np.array([True])]

    def fn(comm: VirtualComm) -> Any:
        comm.send(arrays, 1 - comm.rank)
        return comm.recv(1 - comm.rank)

    for got in run_ranks(2, fn):
        assert len(got) == 3
        for x, y in zip(got, arrays, strict=True):
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)


def test_sent_arrays_are_copies() -> None:
    def fn(comm: VirtualComm) -> Any:
        mine = np.zeros(2)
        comm.send([mine], 1 - comm.rank)
        mine += 1
        comm.allgather(None)
        got = comm.recv(1 - comm.rank)[0]
        got += 2
        comm.allgather(None)
        return mine, got

    for mine, got in run_ranks(2, fn):
        assert mine.tolist() == [1, 1]
        assert got.tolist() == [2, 2]


def test_allgather_is_in_rank_order() -> None:
    def fn(comm: VirtualComm) -> Any:
        return [comm.allgather((comm.rank, turn)) for turn in range(20)]

    want = [[(rank, turn) for rank in range(5)] for turn in range(20)]
    assert run_ranks(5, fn) == [want] * 5


def test_gathered_lists_are_not_shared() -> None:
    def fn(comm: VirtualComm) -> Any:
        gathered = comm.allgather(comm.rank)
        comm.allgather(None)
        if comm.rank == 0:
            gathered.clear()
        comm.allgather(None)
        return gathered

    assert run_ranks(3, fn) == [[], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("call", ["recv", "allgather", "send"])
def test_exception_ends_all_ranks_and_names_its_rank(call: str) -> None:
    ended = []

    def fn(comm: VirtualComm) -> None:
        try:
            if comm.rank == 2:
                raise KeyError("lost")
            while True:
                if call == "recv":
                    comm.recv(2)
                elif call == "allgather":
                    comm.allgather(None)
                else:
                    comm.send([], 2)
                    time.sleep(0.001)
        finally:
            ended.append(comm.rank)

    with pytest.raises(KeyError, match="lost") as raised:
        run_ranks(4, fn)
    assert raised.value.__notes__ == ["raised on virtual rank 2 of 4"]
    assert sorted(ended) == [0, 1, 2, 3]


def test_first_exception_is_raised() -> None:
    def fn(comm: VirtualComm) -> None:
        if comm.rank == 1:
            raise KeyError("first")
        try:
            comm.recv(1)
        finally:
            raise OSError("second")

    with pytest.raises(KeyError, match="first"):
        run_ranks(2, fn)


@pytest.mark.parametrize(
    ("fn", "waits"),
    [
        (
            lambda comm: comm.recv((comm.rank + 1) % 3, tag=4),
            "rank 0 for a message from rank 1 with tag 4, "
            "rank 1 for a message from rank 2 with tag 4, "
            "rank 2 for a message from rank 0 with tag 4",
        ),
        (
            lambda comm: comm.rank == 1 or comm.allgather(1),
            "rank 0 for all ranks to join an allgather, rank 2 for all ranks to join an allgather",
        ),
        (
            lambda comm: comm.recv(2) if comm.rank == 0 else comm.send([], 0, tag=1),
            "rank 0 for a message from rank 2 with tag 0",
        ),
    ],
    ids=["ring", "missing from allgather", "wrong tag"],
)
def test_deadlock_raises_with_all_waits(fn: Any, waits: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        run_ranks(3, fn)
    assert str(raised.value) == f"deadlock: every rank still running waits: {waits}"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_wire_dtype_rounds_messages_only(dtype: str) -> None:
    third = np.array([1 / 3])

    def fn(comm: VirtualComm) -> Any:
        comm.send([third, np.array([2**53 + 1])], 1 - comm.rank)
        return *comm.recv(1 - comm.rank), comm.allgather(third)[0]

    for floats, integers, gathered in run_ranks(2, fn, wire_dtype=dtype):
        assert floats.dtype == np.float64
        assert floats == third.astype(dtype).astype(np.float64) != third
        assert integers == 2**53 + 1
        assert gathered == third


@pytest.mark.parametrize(("wire", "itemsize"), [(None, 8), *LOG_DTYPES])
def test_log_holds_every_message_in_order(wire: str | None, itemsize: int) -> None:
    log: list[Message] = []

    def fn(comm: VirtualComm) -> None:
        if comm.rank == 0:
            comm.send([np.zeros(3), np.zeros((2, 2))], 1, tag=5)
            comm.send([], 2, tag=6)
        comm.allgather(None)
        if comm.rank == 1:
            comm.send([np.zeros(1)], 0)

    run_ranks(3, fn, wire_dtype=wire, log=log)
    assert log == [
        Message(0, 1, 5, 7 * itemsize), Message(0, 2, 6, 0), Message(1, 0, 0, itemsize),
    ]  # fmt: skip


def test_hosts_are_given_per_rank() -> None:
    assert run_ranks(3, lambda comm: comm.host, hosts=["x", "y", "x"]) == ["x", "y", "x"]
    assert len(set(run_ranks(3, lambda comm: comm.host))) == 1


@pytest.mark.parametrize(
    ("P", "options", "text"),
    [
        (0, {}, "P: expected at least 1 rank, got 0"),
        (2, {"hosts": ["a"]}, "hosts: expected one for each of 2 ranks, got 1"),
    ],
)
def test_bad_number_of_ranks_raises(P: int, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        run_ranks(P, lambda comm: None, **options)
    assert str(raised.value) == text


@pytest.mark.parametrize("dest", [-1, 2])
def test_send_to_missing_rank_raises(dest: int) -> None:
    def fn(comm: VirtualComm) -> None:
        if comm.rank == 1:
            comm.send([], dest)

    with pytest.raises(ValueError, match=f"^dest: expected a rank below 2, got {dest}"):
        run_ranks(2, fn)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_ends_all_ranks() -> None:
    ended: list[int] = []
    caller = threading.get_ident()

    def fn(comm: VirtualComm) -> None:
        try:
            comm.allgather(None)
            if comm.rank == 0:
                time.sleep(0.05)  # the caller waits for the ranks by now
                signal.pthread_kill(caller, signal.SIGINT)
                while True:  # never waits: no deadlock
                    comm.send([], 0)
                    time.sleep(0.001)
            comm.recv(0)
        finally:
            ended.append(comm.rank)

    with pytest.raises(KeyboardInterrupt):
        run_ranks(3, fn)
    deadline = time.monotonic() + 30
    while len(ended) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(ended) == [0, 1, 2]


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    run_ranks(5, lambda comm: comm.allgather(None))
    assert threading.active_count() == before
