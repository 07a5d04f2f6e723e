"""The watchdog: when a rank stops, the others report what they wait for, and the run ends."""

import gc
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from lvxattn.common.meter import Block
from lvxattn.common.wire import BLOCKS, KEYS_VALUES, NAMES, PARTIALS, RESULTS
from lvxattn.mpi_impl import Layout, collectives, cross_attention
from lvxattn.mpi_impl.commands import doctor, run
from lvxattn.mpi_impl.exchange import Exchange
from lvxattn.mpi_impl.transport import death_notice, watchdog
from lvxattn.mpi_impl.transport.watchdog import Watchdog, timeout, watching
from tests.commands import commands
from tests.launch import PROGRAMS, gone, mpiexec

RESULTS_HOME = NAMES["lv-xattn"][1]
KEYS, GRADIENTS = NAMES["ring"]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("schedule", "rank", "where", "block", "waits"),
    [
        (
            "lv-xattn", 1, "forward", 1,
            {
                0: {
                    Block(RESULTS_HOME, 0, 3, source=2),
                    Block(RESULTS_HOME, 2, 2, dest=1),
                },
                2: {Block(RESULTS_HOME, 0, 2, source=1)},
            },
        ),
        (
            "ring", 2, "backward", 0,
            {
                0: {Block(KEYS, 1, 2, source=2)},
                1: {
                    Block(GRADIENTS, 1, 3, source=0),
                    Block(KEYS, 1, 1, dest=2),
                    Block(KEYS, 0, 2, dest=2),
                },
            },
        ),
        (
            "lv-xattn", 0, "agree", 0,
            {rank: {"all ranks to agree on a layout"} for rank in (1, 2)},
        ),
    ],
)  # fmt: skip
def test_stopped_rank_ends_the_run_and_waits_are_named(
    schedule: str, rank: int, where: str, block: int, waits: dict[int, set[Any]]
) -> None:
    ended = mpiexec(
        3, PROGRAMS / "stop_rank.py", schedule, str(rank), where, str(block),
        env={"LVXATTN_TIMEOUT": "3"},
    )  # fmt: skip
    assert not ended.timed_out
    assert ended.status != 0
    said = dict(re.findall(r"rank (\d) of 3 has waited 3 s for (.*); it is at", ended.err))
    # An MPI may take a small message before its receiver asks for it, or not.
    assert {int(rank) for rank in said} == set(waits)
    for number, what in said.items():
        assert what in map(str, waits[int(number)])
    assert "stop_rank.py" in ended.err  # the caller's line
    deadline = time.monotonic() + 60
    pids = [int(word) for word in ended.out.split("\n")[0].split()]
    assert len(pids) == 3
    causes = re.findall(r"rank (\d) of the world \(process (\d+)\) is stopped$", ended.err, re.M)
    assert set(causes) == {(str(rank), str(pids[rank]))}
    assert "died" not in ended.err  # those that the watchdog ends
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, f"still there: {[p for p in pids if not gone(p)]}"
        time.sleep(0.05)


@pytest.mark.mpi
@pytest.mark.parametrize("hosts", [1, 2])
def test_late_rank_changes_nothing(hosts: int) -> None:
    """Ranks that report a wait go on if it ends: nothing is left of it."""
    ended = mpiexec(
        3, PROGRAMS / "late_rank.py", str(hosts), "1", "3", "60", env={"LVXATTN_TIMEOUT": "1"}
    )
    assert "has waited 1 s for" in ended.err
    assert (ended.status, ended.out.count("as before")) == (0, 3), ended.err
    assert "no answer" not in ended.err


@pytest.mark.mpi
@pytest.mark.parametrize("hosts", [1, 2])
def test_missing_rank_is_named_between_hosts_alone(hosts: int) -> None:
    ended = mpiexec(
        3, PROGRAMS / "late_rank.py", str(hosts), "0", "600", "2", env={"LVXATTN_TIMEOUT": "1"}
    )
    assert not ended.timed_out
    assert ended.status != 0
    # On one host a rank that is stopped is named, and others may be busy.
    assert bool(re.search("no answer from rank 0 on host0.*: lost, busy, or", ended.err)) == (
        hosts == 2
    ), ended.err


def test_tags_differ() -> None:
    tags = [BLOCKS, RESULTS, collectives._ALL_TO_ALL, watchdog._ENDS_TOO, run._NUMBERS, doctor._TAG]
    assert len({*tags}) == len(tags)


@pytest.mark.mpi
@pytest.mark.slow
def test_stopped_rank_ends_the_demo(tmp_path: Path) -> None:
    program, picture = PROGRAMS / "stop_demo.py", tmp_path / "demo.png"
    ended = mpiexec(3, program, picture, env={"LVXATTN_TIMEOUT": "3"})
    assert not ended.timed_out
    assert ended.status != 0
    for rank in (0, 2):
        said = f"rank {rank} of 3 has waited 3 s for all ranks' objects to be gathered; it is at"
        assert said in ended.err
    assert re.search(r"^rank 1 of the world \(process \d+\) is stopped$", ended.err, re.M)
    assert not list(tmp_path.iterdir())


def test_wait_names_kind_owner_hop_and_neighbour() -> None:
    layout = Layout(
        rank=1, order=(0, 2, 1, 3), s_q=(1,) * 4, s_kv=(1,) * 4, masks=(None,) * 4,
        rules=(False,) * 4,
        B=1, H=1, H_KV=1, D=1, D_V=1, dtype="float32", scale=1.0, schedule="lv-xattn",
    )  # fmt: skip
    exchange = Exchange(MPI.COMM_SELF, layout, np.zeros(1, np.float32))
    rotation = exchange.rotation(PARTIALS)
    assert rotation.awaited(rotation.comes[2]) == Block(RESULTS_HOME, 0, 2, source=2)
    assert rotation.leaving(rotation.leaves[1]) == Block(RESULTS_HOME, 2, 2, dest=3)
    of_keys = Exchange(MPI.COMM_SELF, replace(layout, schedule="ring"), np.zeros(1, np.float32))
    rotation = of_keys.rotation(KEYS_VALUES)
    assert rotation.awaited(rotation.comes[1]) == Block(KEYS, 2, 1, source=2)
    assert rotation.leaving(rotation.leaves[0]) == Block(KEYS, 1, 1, dest=3)


@pytest.mark.parametrize("value", ["abc", "0", "-1", "inf", "nan"])
def test_bad_timeout_raises(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_TIMEOUT", value)
    x = np.ones((1, 1, 2, 2))
    message = f"LVXATTN_TIMEOUT: expected a number of seconds above 0, got '{value}'"
    with pytest.raises(ValueError, match=rf"{message} \(on rank 0 of 1\)"):
        cross_attention(x, x, x, MPI.COMM_SELF)


@pytest.mark.mpi
def test_bad_timeout_prints_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_TIMEOUT", "soon")
    (said,) = commands(2, ["run"])
    assert said.status == 2
    assert said.err.count("\n") == 1
    assert "got 'soon'" in said.err


def test_no_watchdog_without_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LVXATTN_TIMEOUT", raising=False)
    assert timeout(MPI.COMM_SELF) is None
    assert Watchdog.armed(MPI.COMM_SELF) is None
    before = threading.active_count()
    with watching(MPI.COMM_SELF, "nothing"):
        assert threading.active_count() == before


def test_message_in_time_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []
    monkeypatch.setattr(watchdog, "_end", ended.append)
    dog = Watchdog(MPI.COMM_SELF, 60.0)
    with dog.over(lambda: "this"):
        dog.look()
    dog.look()
    dog.stop()
    assert ended == []


@pytest.mark.parametrize("comes", [True, False])
def test_run_ends_unless_block_arrives_in_grace(
    comes: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(watchdog, "_end", ended.append)
    dog = Watchdog(MPI.COMM_SELF, 1e-9)
    # The grace: the block comes during it, or does not.
    monkeypatch.setattr(
        watchdog.time, "sleep", lambda _: setattr(dog, "_waiting", None) if comes else None
    )
    monkeypatch.setattr(watchdog, "_watch", lambda *_: None)  # this test looks, no thread
    with dog.over(lambda: "godot"):
        time_passes()
        dog.look()
    assert ended == ([] if comes else [MPI.COMM_SELF])
    said = capfd.readouterr().err
    assert "rank 0 of 1 has waited 1e-09 s for godot; it is at" in said
    assert "in test_run_ends_unless" in said


def test_polling_wait_warns_once_and_ends_after_grace(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(watchdog, "_end", ended.append)
    dog = Watchdog(MPI.COMM_SELF, 10.0)
    for waited in (0.1, 9.9, 10.1, 10.2, 11.9):
        dog.check(waited, lambda: "godot")
    assert capfd.readouterr().err.count("rank 0 of 1 has waited 10 s for godot") == 1
    assert ended == []
    dog.check(10.0 + watchdog.GRACE + 0.1, lambda: "godot")
    assert ended == [MPI.COMM_SELF]
    for waited in (0.1, 10.1):  # it came after all, and now another is awaited
        dog.check(waited, lambda: "another")
    assert "for another" in capfd.readouterr().err


def test_wait_yields_and_oversleeps_by_5_percent_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, given, slept = [0.0], [0], list[float]()

    def give() -> None:
        given[0] += 1
        now[0] += 3e-4

    def sleep(seconds: float) -> None:
        slept.append(seconds / now[0])
        now[0] += seconds

    class Comes:
        def Test(self) -> bool:
            return now[0] >= 0.1

    monkeypatch.setattr(watchdog.os, "sched_yield", give)
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(watchdog, "time", clock)
    watchdog.wait(Comes(), None, lambda: "a block")
    assert given == [4]  # a millisecond of it
    assert slept[0] == pytest.approx(1 / 20)
    assert 0.1 <= now[0] <= 0.101  # and a millisecond at most
    assert len(slept) < 200


@pytest.mark.parametrize(
    ("what", "note"),
    [
        (
            Block("the queries of rank {}", owner=0, hop=2, source=1),
            "while waiting for the queries of rank 0 at hop 2, from rank 1: rank 1 may have ended",
        ),
        (
            Block("the queries of rank {}", owner=0, hop=2, dest=3),
            "while waiting for rank 3 to take the queries of rank 0 at hop 2: "
            "rank 3 may have ended",
        ),
        (
            Block("all ranks' rows"),
            "while waiting for all ranks' rows: one of them may have ended",
        ),
    ],
)
def test_failing_wait_names_the_awaited_rank_and_not_its_own(
    what: Block, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails:
        def Test(self) -> bool:
            raise MPI.Exception(MPI.ERR_OTHER)

    slept = list[float]()
    monkeypatch.setattr(death_notice.time, "sleep", slept.append)
    with pytest.raises(MPI.Exception) as raised, death_notice.named(MPI.COMM_SELF):
        watchdog.wait(Fails(), None, lambda: what)
    assert raised.value.__notes__ == [
        note,
        "noticed on rank 0 of 1, which need not be the cause",
    ]
    assert slept == [death_notice.GRACE]  # in which the cause is reported
    with pytest.raises(MPI.Exception) as raised, watching(MPI.COMM_SELF, "all ranks to agree"):
        raise MPI.Exception(MPI.ERR_OTHER)
    (said,) = raised.value.__notes__
    assert said == "while waiting for all ranks to agree: one of them may have ended"


def test_pass_goes_on_where_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[Any]()

    def refuse(*command: Any, **_: Any) -> None:
        tried.append(command)
        raise BlockingIOError

    monkeypatch.setattr(death_notice.subprocess, "Popen", refuse)
    monkeypatch.setattr(death_notice, "_shells", [])
    monkeypatch.setattr(death_notice, "_pmi_socket", lambda: 1)
    monkeypatch.delenv(death_notice.VARIABLE, raising=False)
    for _ in range(2):
        death_notice.announce_under_hydra()
    death_notice.announce_death(MPI.COMM_WORLD)
    assert len(tried) == 1  # not in every pass
    death_notice.end_unannounced()


def time_passes() -> None:
    """Let the clock move on, however coarse it is."""
    start = time.monotonic()
    while time.monotonic() == start:
        pass


def test_failed_pass_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "LVXATTN_TIMEOUT": "60"})
    dog = Watchdog.armed(MPI.COMM_SELF)
    assert dog is not None
    with pytest.raises(KeyError), dog.over(lambda: "a block"):
        raise KeyError
    thread = dog._thread
    assert thread is not None
    del dog
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
