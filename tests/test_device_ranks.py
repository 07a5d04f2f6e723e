"""The way of device arrays through MPI, on real ranks, with arrays whose kernels run late."""

import os
from typing import Any

import pytest

from tests.launch import PROGRAMS, mpiexec, report

pytestmark = pytest.mark.mpi

KINDS = {"0": "StagedBuffer", "1": "DeviceBuffer"}
BUFFER_CHECKS = {
    "what kernels write is sent",
    "kernels read a block before the next is received",
    "what is received is delivered",
}


def device(P: int, aware: str | None, *left_out: str) -> Any:
    return report(P, "run_device.py", *left_out, env={"LVXATTN_CUDA_AWARE": aware})


@pytest.mark.parametrize("aware", ["0", "1"])
@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_device_arrays_give_right_results_staged_and_direct(P: int, aware: str) -> None:
    got = device(P, aware)
    assert got["buffer"] == KINDS[aware]
    assert got["decision"] == [aware == "1", f"LVXATTN_CUDA_AWARE={aware}"]
    assert len(got["ranks"]) == P
    for checks in got["ranks"]:
        assert set(checks) > BUFFER_CHECKS
        assert all(checks.values()), checks


@pytest.mark.parametrize(
    ("aware", "left_out", "missed"),
    [
        ("0", "send", "float64"),
        ("0", "send", "what kernels write is sent"),
        ("0", "receive", "kernels read a block before the next is received"),
        ("0", "deliver", "float64"),
        ("0", "deliver", "what is received is delivered"),
        ("0", "all", "float64"),
        ("1", "send", "what kernels write is sent"),
        ("1", "receive", "kernels read a block before the next is received"),
        ("1", "all", "float64"),
    ],
)
def test_every_synchronisation_is_missed_when_it_is_left_out(
    aware: str, left_out: str, missed: str
) -> None:
    """The fake device tells: so the tests above would notice."""
    assert any(checks[missed] is False for checks in device(3, aware, left_out)["ranks"])


@pytest.mark.parametrize("wish", [None, "auto"])
def test_without_a_wish_the_library_is_asked(wish: str | None) -> None:
    got = device(1, wish)
    aware, why = got["decision"]
    assert why in ("MPIX_Query_cuda_support", "MPIX_GPU_query_support", "mpi_memory_alloc_kinds")
    assert got["buffer"] == KINDS[str(int(aware))]


def test_the_mpi_of_the_wheel_is_not_cuda_aware_and_blocks_are_staged() -> None:
    if os.environ.get("LVXATTN_MPIEXEC"):
        pytest.skip("the machine's MPI is used")
    assert device(1, None)["buffer"] == "StagedBuffer"


def test_another_wish_is_a_clear_error() -> None:
    ended = mpiexec(2, PROGRAMS / "run_device.py", env={"LVXATTN_CUDA_AWARE": "yes"}, timeout=30)
    assert (ended.timed_out, ended.left) == (False, ())
    assert ended.status != 0
    assert "ValueError: LVXATTN_CUDA_AWARE: expected auto, 0 or 1, got 'yes'" in ended.err
