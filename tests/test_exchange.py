"""Messages and bytes, counted by formula, by the meter and by the calls of MPI."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.common.validation import accumulator
from lvxattn.common.wire import BLOCKS, RESULTS
from tests.cases import Case
from tests.launch import PROGRAMS, mpiexec, report

pytestmark = pytest.mark.mpi

# As in programs/run_traffic.py.
PROBLEMS = {
    case.name: case
    for case in (
        Case("float64", cut="ragged"),
        Case("float32", cut="ragged", dtype="float32", D_V=5),
        Case("float16", cut="ragged", dtype="float16", D_V=5),
        Case("grouped", B=2, H=6, H_KV=2, cut="ragged", dtype="float32", mask="full"),
        Case("one key-value head", H=6, H_KV=1, dtype="float16"),
        Case("fewer queries than ranks", S_Q=2),
        Case("two hosts", cut="ragged"),
    )
}


NUMBERS = pytest.mark.parametrize("P", [1, 2, 3, 4, pytest.param(5, marks=pytest.mark.slow)])


def traffic(P: int) -> Any:
    return report(P, "run_traffic.py")


def progress(P: int) -> Any:
    return report(P, "run_progress.py")


def ring(case: Case, P: int) -> list[int]:
    """Return the order of the ring: host by host."""
    return sorted(range(P), key=lambda r: r % 2) if case.name == "two hosts" else list(range(P))


def expected(case: Case, P: int, rank: int, which: str) -> tuple[list[int], list[int]]:
    """Return the sizes of the blocks and of the results that a rank sends, in bytes, in order."""
    cuts, _ = case.cuts(P)
    order = ring(case, P)
    place = order.index(rank)
    owners = [order[(place - hop) % P] for hop in range(P)]  # whose block is here, after each hop
    rows = [case.B * case.H * (cuts[owner + 1] - cuts[owner]) for owner in owners]
    w, a = np.dtype(case.dtype).itemsize, np.dtype(accumulator(case.dtype)).itemsize
    block, result = {
        "forward": (case.D * w, (case.D_V + 2) * a),
        "backward": ((case.D + case.D_V) * w + 2 * a, case.D * a),
    }[which]
    return [n * block for n in rows[:-1]], [n * result for n in rows[1:]]


@pytest.mark.parametrize("which", ["forward", "backward"])
@NUMBERS
@pytest.mark.parametrize("name", PROBLEMS)
class TestTraffic:
    def test_every_message_has_the_size_of_the_formula(self, name: str, P: int, which: str) -> None:
        case, got = PROBLEMS[name], traffic(P)[name]
        assert got["worst"] <= 1
        assert got["order"] == ring(case, P)
        for rank in range(P):
            blocks, results = expected(case, P, rank, which)
            sent = got["ranks"][rank][which]["sent"]
            assert sent == ({str(BLOCKS): blocks, str(RESULTS): results} if P > 1 else {})

    def test_meter_counts_what_mpi_sends(self, name: str, P: int, which: str) -> None:
        for rank in range(P):
            got = traffic(P)[name]["ranks"][rank][which]
            sizes = [size for tag in got["sent"].values() for size in tag]
            assert got["metered"] == [len(sizes), sum(sizes)]
            assert len(sizes) == 2 * (P - 1)
            assert all(seconds >= 0 for seconds in got["seconds"])
            assert got["seconds"][0] > 0

    def test_only_neighbours_on_the_ring_talk(self, name: str, P: int, which: str) -> None:
        order = ring(PROBLEMS[name], P)
        for place, rank in enumerate(order):
            got = traffic(P)[name]["ranks"][rank][which]
            left, right = order[(place - 1) % P], order[(place + 1) % P]
            assert (got["to"], got["from"]) == (([right], [left]) if P > 1 else ([], []))
            sent_to_it = traffic(P)[name]["ranks"][left][which]["sent"].values()
            assert got["bytes received"] == sum(size for tag in sent_to_it for size in tag)

    def test_no_request_is_left(self, name: str, P: int, which: str) -> None:
        for rank in range(P):
            got = traffic(P)[name]["ranks"][rank][which]
            assert got["active"] == 0
            assert got["requests"] == 4 * (P - 1)
            hops = {"Isend": 2 * (P - 1), "Irecv": 2 * (P - 1)} if P > 1 else {}
            look = {"Iallreduce": 1} if which == "backward" else {}  # whether lse will do
            assert got["calls"] == hops | look


@NUMBERS
def test_virtual_ranks_send_the_same_messages(P: int) -> None:
    """The reference's log, in fp64, equals the messages of real ranks."""
    problem = PROBLEMS["float64"].make()
    log: list[reference.Message] = []

    def forward(comm: reference.VirtualComm) -> None:
        part = problem.part(comm.rank, comm.size)
        reference.cross_attention(part["q"], part["k"], part["v"], comm)

    reference.run_ranks(P, forward, log=log)
    for rank in range(P):
        sent: dict[str, list[int]] = {}
        for message in log:
            if message.source == rank:
                sent.setdefault(str(message.tag), []).append(message.nbytes)
        assert sent == traffic(P)["float64"]["ranks"][rank]["forward"]["sent"]


@pytest.mark.parametrize("P", [pytest.param(2, marks=pytest.mark.slow), 3])
class TestProgress:
    """Large messages progress while a rank computes, as it calls MPI between tiles."""

    def test_progress_completes_a_large_block(self, P: int) -> None:
        for rank in progress(P):
            assert rank["arrived by progress"]
            assert rank["right bytes"]

    def test_progress_after_every_tile_while_messages_are_pending(self, P: int) -> None:
        for rank in progress(P):
            for which in ("forward", "backward"):
                assert rank[which]["tiles"] == rank[which]["tests"]
                assert rank[which]["tiles"] >= 7 * P
                assert rank[which]["tests with a request under way"] > 0
                assert rank[which]["first test has the block's requests"]

    def test_block_is_forwarded_before_it_is_used(self, P: int) -> None:
        hops = [event for h in range(P - 1) for event in ("shift", "attend")]
        for rank in progress(P):
            for which in ("forward", "backward"):
                # My own block first; on the last hop nothing to pass on; then the rest.
                assert rank[which]["blocks"] == [*hops, "attend", "attend"]


def available_memory() -> int:
    """Return the free memory in bytes; 0 where it is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 16 * 2**30, reason="needs 16 GiB of memory")
def test_block_of_more_than_2_gib_arrives() -> None:
    ended = mpiexec(2, PROGRAMS / "large_block.py", timeout=100)
    assert (ended.status, ended.out) == (0, "right\n" * 2), ended.err


@pytest.mark.parametrize("schedule", ["lv-xattn", "ring"])
def test_blocks_that_skip_ranks_keep_their_order(schedule: str) -> None:
    """A block received may be sent at once, but not before an earlier one that is not ready."""
    for apart, buffers in report(4, "late_buffers.py", schedule):
        assert apart == 0
        assert 0 < buffers <= 3
