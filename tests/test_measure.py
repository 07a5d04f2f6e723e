"""Measuring a machine: the probes find the figures of a made-up one."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lvxattn.plan import measure as module
from lvxattn.plan.machine import Link, Machine, Measured
from lvxattn.plan.measure import BLOCK, MESSAGE, measure
from lvxattn.plan.models import planned
from lvxattn.plan.simulate import cost, play
from lvxattn.plan.steps import Compute
from lvxattn.reference import VirtualComm, run_ranks
from tests.launch import mpiexec
from tests.torch_ranks import forked

INSIDE, BETWEEN = Link(5e9, 1e-5, 0.9), Link(2e8, 5e-5, 0.1)
MACHINE = Machine(
    "made up",
    4e10,
    2e10,
    5e-5,
    1e9,
    INSIDE,
    BETWEEN,
    2,
    4,
    3e9,
    2e-4,
    0.25,
    4e-5,
    2e-5,
    5e10,
    1.5e10,
    2e9,
)
CLOCK = threading.local()  # a virtual rank's


@dataclass
class FakeProbe:
    """Advances the clock by the time that a machine would take, and does nothing else."""

    comm: VirtualComm
    machine: Machine
    hosts: list[str]
    shape: tuple[int, int, int] = (4, 2, 64)
    dtype: str = "float32"
    slow: float = 1.0
    by: str = "fake"
    cold: bool = False

    @property
    def device_name(self) -> str:
        return f"device {self.comm.rank // 2}"

    @property
    def room(self) -> float:
        return self.machine.room + self.comm.rank

    def prepare(self, s_q: int, s_kv: int, *, backward: bool = False) -> Callable[[], None]:
        assert s_q <= 8192  # a block that a device has room for
        assert s_kv <= 2**20
        H, H_KV, D = self.shape
        layout = planned((1, H, s_q, D), (1, H_KV, s_kv, D), 1, dtype=self.dtype)
        step = Compute(s_q, s_kv)
        return lambda: _pass(self.slow * cost(step, layout, self.machine, backward=backward))

    def call(self, *, alone: bool, schedule: str = "lv-xattn") -> Callable[[], None]:
        P, (H, H_KV, D) = 1 if alone else self.comm.size, self.shape
        layout = planned((1, H, P, D), (1, H_KV, 2 * P, D), P, dtype=self.dtype, schedule=schedule)
        took = sum(play(layout, self.machine, backward=b).seconds for b in (False, True))
        return lambda: _pass(took)

    def copy(self, nbytes: int, *, new: bool = False) -> Callable[[], None]:
        machine = self.machine
        rate = (machine.copy_new if new else None) or machine.copy

        def copy() -> None:
            # What was not new to a process just before comes from further away.
            _pass(nbytes / rate * (10 if new and self.cold else 1))
            self.cold = not new

        return copy

    def shift(
        self, nbytes: int, left: int, right: int, block: tuple[int, int] = (1, 1), times: int = 0
    ) -> Callable[[], None]:
        apart = any(self.hosts[self.comm.rank] != self.hosts[of] for of in (left, right))
        link = self.machine.between if apart else self.machine.inside
        took, work = link.latency + nbytes / link.bandwidth, self.prepare(*block)

        def message() -> None:
            sent = _now()
            for _ in range(times):
                work()
            _pass(max(link.busy * took * (times > 0), sent + took - _now()))

        return message

    def together(self) -> None:
        self.comm.allgather(None)


def _pass(seconds: float) -> None:
    CLOCK.now = _now() + seconds


def _now() -> float:
    return float(getattr(CLOCK, "now", 0.0))


def measured(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, hosts: list[str], **given: Any
) -> list[Machine]:
    """Measure a made-up machine on virtual ranks, each of which believes to be on its host."""
    monkeypatch.setattr(module, "perf_counter", _now)
    monkeypatch.setattr(module.socket, "gethostname", lambda: hosts[CLOCK.rank])

    def on_a_rank(comm: VirtualComm) -> Machine:
        CLOCK.rank = comm.rank
        slow = given.get("slow", [1.0] * comm.size)[comm.rank]
        return measure(comm, FakeProbe(comm, machine, hosts, slow=slow), "found")

    return run_ranks(len(hosts), on_a_rank)


@pytest.mark.parametrize("hiding", [0.0, 0.4, 1.0])
def test_measured_figures_match_the_machine(hiding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(MACHINE, hiding=hiding)
    found, *others = measured(monkeypatch, machine, ["a", "b", "a", "b"])
    assert all(other == found for other in others)
    # Many queries still read a few keys, and a single one still computes.
    for name in (
        "matmul", "memory", "start", "copy", "call", "message", "message_at_once",
        "matmul_backward", "memory_backward", "copy_new",
    ):  # fmt: skip
        assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=0.12), name
    assert found.hiding == pytest.approx(hiding, abs=0.15)
    for link, of in ((found.inside, INSIDE), (found.between, BETWEEN)):
        assert link.bandwidth == pytest.approx(of.bandwidth, rel=1e-3)
        assert link.latency == pytest.approx(of.latency, rel=1e-2)
        assert link.busy == pytest.approx(of.busy, abs=0.05)
    assert (found.name, found.ranks, found.ranks_per_host) == ("found", 4, 2)
    assert found.room == MACHINE.room  # of the rank that has least
    assert found.measured == Measured("fake", "device 0 and device 1", 4, 2, 64, "float32")


def test_slowest_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, MACHINE, ["a", "a"], slow=[1.0, 3.0])[0]
    assert found.matmul == pytest.approx(MACHINE.matmul / 3, rel=0.12)


def test_missing_link_gets_figures_of_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_host = measured(monkeypatch, MACHINE, ["a", "a", "a"])[0]
    assert one_host.between == one_host.inside
    assert one_host.inside.bandwidth == pytest.approx(INSIDE.bandwidth, rel=1e-3)
    one_each = measured(monkeypatch, MACHINE, ["a", "b", "c"])[0]
    assert one_each.inside == one_each.between
    assert one_each.between.bandwidth == pytest.approx(BETWEEN.bandwidth, rel=1e-3)
    alone = measured(monkeypatch, MACHINE, ["a"])[0]
    assert alone.inside == alone.between == Link(alone.memory, alone.start)


def test_probes_end_on_a_very_fast_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = Link(1e30, 0.0)
    fast = Machine("fast", 1e20, 1e20, 0.0, 1e9, free, free, 2, 2, 1e30, 0.0)
    measured(monkeypatch, fast, ["a", "a"])[0].check()


@pytest.mark.parametrize("slower", [1, 20, 1000])
def test_measuring_takes_less_than_ten_seconds(
    slower: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = []
    links = {
        name: replace(link, bandwidth=link.bandwidth / slower)
        for name, link in (("inside", INSIDE), ("between", BETWEEN))
    }
    machine = replace(MACHINE, **links)

    def on_a_rank(comm: VirtualComm) -> None:
        CLOCK.rank, CLOCK.now = comm.rank, 0.0
        measure(comm, FakeProbe(comm, machine, ["a", "a", "b", "b"]))
        total.append(_now())

    monkeypatch.setattr(module, "perf_counter", _now)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "aabb"[CLOCK.rank])
    run_ranks(4, on_a_rank)
    assert BLOCK < MESSAGE < max(total) < 10


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((2, 8, 64), "float32", "H_KV: expected a divisor of H = 2, got 8"),
        ((8, 8, 0), "float32", "D: expected at least 1, got 0"),
        ((8, 8, 64), "int8", "dtype: expected one of .*, got 'int8'"),
    ],
)
def test_bad_problem_raises_on_all_ranks(
    shape: tuple[int, int, int], dtype: str, says: str
) -> None:
    def on_a_rank(comm: VirtualComm) -> None:
        wrong = comm.rank == 1
        given = {"shape": shape, "dtype": dtype} if wrong else {}
        with pytest.raises(ValueError, match=rf"{says} \(on rank 1 of 2\)"):
            measure(comm, FakeProbe(comm, MACHINE, ["a", "a"], **given))

    run_ranks(2, on_a_rank)


@pytest.mark.parametrize("launch", [mpiexec, forked], ids=["mpi", "torch"])
def test_command_saves_a_machine_file(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = "mpi" if launch is mpiexec else "torch"
    monkeypatch.chdir(tmp_path)
    done = launch(2, "-m", f"lvxattn.{of}_impl", "measure", "--heads", "2", "--head-dim", "16")
    assert done.status == 0, done.err
    figures = "GFLOP/s a rank", "backward", "copying", "a message", "a receiver is busy"
    assert all(text in done.out for text in figures), done.out
    (file,) = tmp_path.iterdir()
    machine = Machine.load(file)
    name = f"machine-{of}"
    assert (machine.name, machine.ranks, machine.ranks_per_host) == (name, 2, 2)
    assert machine.inside.bandwidth > 1e6
    cores = f"CPU, {len(os.sched_getaffinity(0))} cores"
    assert machine.measured == Measured(f"{of}_impl", cores, 2, 2, 16, "float32")
