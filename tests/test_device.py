"""Buffers between a device that works late and an MPI that knows nothing of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from lvxattn.mpi_impl import device
from tests import fake_cupy

DEVICE = pytest.mark.parametrize("kind", [device.DeviceBuffer, device.StagedBuffer])


def memory(x: Any) -> np.ndarray[Any, Any]:
    """Return what MPI sees at the address that it is given, without waiting for anything."""
    return x if isinstance(x, np.ndarray) else x.memory


@DEVICE
def test_what_may_be_sent_has_been_written(kind: Callable[..., Any]) -> None:
    buffer = kind(fake_cupy, 4)
    buffer.array[:4] = fake_cupy.asarray(np.arange(4, dtype=np.uint8)) + 1
    assert memory(buffer.sendable(3)).tolist() == [1, 2, 3]


@DEVICE
def test_what_was_received_is_seen_by_the_kernels_that_follow(kind: Callable[..., Any]) -> None:
    buffer = kind(fake_cupy, 4)
    memory(buffer.receivable(2))[...] = [7, 8]
    buffer.deliver(2)
    assert fake_cupy.asnumpy(buffer.array[:2] + 0).tolist() == [7, 8]


@DEVICE
def test_kernels_have_read_a_block_before_it_may_be_overwritten(kind: Callable[..., Any]) -> None:
    buffer = kind(fake_cupy, 2)
    memory(buffer.receivable(2))[...] = [7, 8]
    buffer.deliver(2)
    reader = buffer.array + 0
    memory(buffer.receivable(2))[...] = [1, 2]
    assert fake_cupy.asnumpy(reader).tolist() == [7, 8]


def test_numpy_s_buffers_are_their_arrays() -> None:
    buffer = device.buffer(np, 5)
    assert isinstance(buffer, device.HostBuffer)
    for view in (buffer.sendable(3), buffer.receivable(3)):
        assert view.size == 3
        assert np.shares_memory(view, buffer.array)
    assert buffer.array.nbytes == 5


@pytest.mark.parametrize(("aware", "kind"), [("0", "StagedBuffer"), ("1", "DeviceBuffer")])
def test_the_environment_decides_about_device_memory(
    aware: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", aware)
    assert device.cuda_aware() == (aware == "1", f"LVXATTN_CUDA_AWARE={aware}")
    assert type(device.buffer(fake_cupy, 0)).__name__ == kind


def test_unset_the_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", "auto")
    asked = device.cuda_aware()
    monkeypatch.delenv("LVXATTN_CUDA_AWARE")
    assert device.cuda_aware() == asked
    assert isinstance(asked[0], bool)
    assert asked[1].startswith(("MPIX_", "mpi_memory_alloc_kinds"))


class OpenMPI:
    """A library that answers as Open MPI does."""

    def __init__(self, answer: int) -> None:
        self.MPIX_Query_cuda_support = lambda: answer


class MPICH:
    """A library that answers as MPICH does: a status, and the answer through a pointer."""

    def __init__(self, answer: int, status: int = 0) -> None:
        def query(kind: int, flag: Any) -> int:
            assert kind == 0  # CUDA
            flag._obj.value = answer
            return status

        self.MPIX_GPU_query_support = query


@pytest.mark.parametrize(
    ("library", "answer"),
    [
        (OpenMPI(1), (True, "MPIX_Query_cuda_support")),
        (OpenMPI(0), (False, "MPIX_Query_cuda_support")),
        (MPICH(1), (True, "MPIX_GPU_query_support")),
        (MPICH(0), (False, "MPIX_GPU_query_support")),
        (MPICH(1, status=1), (False, "MPIX_GPU_query_support")),
        (object(), (False, "mpi_memory_alloc_kinds")),
    ],
    ids=lambda x: type(x).__name__,
)
def test_each_library_is_asked_in_its_own_way(
    library: Any, answer: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LVXATTN_CUDA_AWARE", raising=False)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda path: library)
    assert device.cuda_aware() == answer


def test_another_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", "yes")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        device.cuda_aware()
    assert str(raised.value) == "LVXATTN_CUDA_AWARE: expected auto, 0 or 1, got 'yes'"


def test_blas_threads_that_the_environment_sets_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from threadpoolctl import threadpool_info

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = max(pool["num_threads"] for pool in threadpool_info())
    assert device.limit_blas_threads(MPI.COMM_SELF) == before


class TestFakeDevice:
    """What the tests that use it rely on."""

    def test_works_late_and_shows_garbage_until_then(self) -> None:
        x = fake_cupy.asarray(np.ones(2)) + 1
        assert np.isnan(x.memory).all()
        event = fake_cupy.cuda.Event()
        event.synchronize()  # not recorded: nothing to wait for
        assert np.isnan(x.memory).all()
        event.record()
        later = x + 1
        event.synchronize()
        assert x.memory.tolist() == [2, 2]
        assert np.isnan(later.memory).all()
        assert fake_cupy.asnumpy(later).tolist() == [3, 3]

    def test_a_copy_into_a_given_array_is_late_too(self) -> None:
        x, there = fake_cupy.asarray(np.ones(2)), np.zeros(2)
        x.get(out=there)
        assert there.tolist() == [0, 0]
        fake_cupy.cuda.get_current_stream().synchronize()
        assert there.tolist() == [1, 1]

    @pytest.mark.parametrize(
        "mix",
        [
            np.asarray, np.exp, lambda x: x + np.ones(2), lambda x: np.ones(2) + x,
            lambda x: np.concatenate([x, x]), lambda x: fake_cupy.where(x > 0, np.ones(2), x),
            lambda x: x.__setitem__(..., np.ones(2)), lambda x: x[np.array([0])],
        ],
    )  # fmt: skip
    def test_nothing_mixes_with_numpy(self, mix: Any) -> None:
        with pytest.raises(TypeError):
            mix(fake_cupy.asarray(np.ones(2)))

    def test_mpi_finds_its_memory(self) -> None:
        x, y = fake_cupy.asarray(np.arange(3.0)), fake_cupy.empty(3)
        MPI.COMM_SELF.Sendrecv([x, MPI.DOUBLE], 0, recvbuf=[y, MPI.DOUBLE], source=0)
        assert fake_cupy.asnumpy(y).tolist() == [0, 1, 2]
