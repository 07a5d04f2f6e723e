"""The way of device arrays through MPI, on real ranks, with arrays whose kernels run late."""

import os
import re
from typing import Any

import pytest

from tests.launch import PROGRAMS, mpiexec, report

pytestmark = pytest.mark.mpi

KINDS = {"0": "StagedBuffer", "1": "DeviceBuffer"}


CARELESS = (
    "0:StagedBuffer.filled",
    "0:StagedBuffer.sendable",
    "0:StagedBuffer.deliver",
    "1:DeviceBuffer.filled",
    "1:DeviceBuffer.sendable",
)


def device(P: int, way: str, ways: tuple[str, ...] = ("0", "1")) -> Any:
    return report(P, "run_device.py", *ways)[way]


@pytest.mark.parametrize("aware", KINDS)
@pytest.mark.parametrize("P", [1, *(pytest.param(P, marks=pytest.mark.slow) for P in (2, 4)), 3])
class TestPasses:
    """Every schedule, forward and backward."""

    def test_device_arrays_give_correct_results_staged_and_direct(self, P: int, aware: str) -> None:
        got = device(P, aware)
        assert got["buffer"] == KINDS[aware]
        assert got["decision"] == [aware == "1", f"LVXATTN_CUDA_AWARE={aware}"]
        assert len(got["ranks"]) == P
        for right, _ in got["ranks"]:
            assert len(right) == 20 + 6
            assert all(right.values()), right

    def test_only_lse_check_synchronises_a_stream(self, P: int, aware: str) -> None:
        for _, waits in device(P, aware)["ranks"]:
            assert len(waits) == 20
            # A backward looks whether lse will do.
            assert all(n == {"stream": 1} for n in waits.values()), waits


@pytest.mark.parametrize("way", CARELESS)
def test_missing_event_gives_wrong_results(way: str) -> None:
    """The fake device tells: so the tests above would notice."""
    assert any(not all(right.values()) for right, _ in device(3, way, CARELESS)["ranks"])


def test_wheel_mpi_is_not_cuda_aware() -> None:
    if os.environ.get("LVXATTN_MPIEXEC"):
        pytest.skip("the machine's MPI is used")
    got = device(1, "", ("",))
    assert got["buffer"] == "StagedBuffer"
    assert got["decision"][0] is False
    assert got["decision"][1].startswith(("MPIX_", "mpi_memory_alloc_kinds"))


def test_bad_variable_ends_all_ranks() -> None:
    ended = mpiexec(2, PROGRAMS / "run_device.py", "yes", timeout=100)
    assert (ended.timed_out, ended.left) == (False, ())
    assert ended.status != 0
    assert re.search(r"ValueError: LVXATTN_CUDA_AWARE: .*'yes'", ended.err)
