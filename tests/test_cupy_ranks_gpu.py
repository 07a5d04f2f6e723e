"""mpi_impl on CuPy arrays, alone and on ranks that share a GPU, where there is one."""

import json
from importlib.util import find_spec
from typing import Any

import pytest

from tests.launch import PROGRAMS, mpiexec

pytestmark = pytest.mark.mpi


def has_device() -> bool:
    """Say whether CuPy finds a device; in this process it would hold on to one."""
    if find_spec("cupy") is None:
        return False
    import cupy

    try:
        return bool(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def on_ranks(P: int, *args: str, **env: str | None) -> Any:
    """Return what `run_gpu.py` prints."""
    ended = mpiexec(P, PROGRAMS / "run_gpu.py", *args, timeout=100, strict=False, env=env)
    assert not ended.timed_out, f"{ended.out[-2000:]}\n{ended.err[-4000:]}"
    assert ended.status == 0, f"{ended.out[-2000:]}\n{ended.err[-4000:]}"
    assert not ended.left, ended.left
    # A library may have something to say before it.
    return json.loads(ended.out[ended.out.index('{"ranks"') :].splitlines()[0])


def all_right(got: Any, P: int) -> None:
    assert len(got["ranks"]) == P
    for report in got["ranks"]:
        assert report
        assert all(report.values()), [name for name, right in report.items() if not right]


@pytest.mark.gpu
@pytest.mark.skipif(not has_device(), reason="needs CuPy and a CUDA device")
@pytest.mark.parametrize("aware", ["auto", "0"])
@pytest.mark.parametrize("P", [1, 2, 4])
def test_ranks_that_share_a_gpu_are_right(P: int, aware: str) -> None:
    got = on_ranks(P, LVXATTN_CUDA_AWARE=aware)
    all_right(got, P)
    if aware == "0":
        assert got["buffer"] == "StagedBuffer"
    elif got["buffer"] != "DeviceBuffer":
        pytest.skip("right, but staged: this MPI takes no device memory")


def test_gpu_program_runs_on_fake_cupy() -> None:
    got = on_ranks(2, "fake", LVXATTN_CUDA_AWARE="0")
    all_right(got, 2)
    assert got["buffer"] == "StagedBuffer"
