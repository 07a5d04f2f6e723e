"""Buffers shared by an asynchronous device and MPI, streams and memory."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.cli.tensors import InputError
from lvxattn.common.exchange_base import Leg
from lvxattn.common.wire import QUERIES
from lvxattn.mpi_impl import exchange
from lvxattn.mpi_impl.commands.run import choose_backend
from lvxattn.mpi_impl.lv_xattn import lv_xattn
from lvxattn.mpi_impl.measure import Probe
from lvxattn.mpi_impl.transport import buffers, device, transfers
from tests import fake_cupy
from tests.cases import Case

KINDS = [buffers.DeviceBuffer, buffers.StagedBuffer]
DEVICE = pytest.mark.parametrize("kind", KINDS)
Kind = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_stream() -> Iterator[fake_cupy.Stream]:
    """Compute on another stream, as the front door does; nothing may wait for all of a stream."""
    fake_cupy.whole.clear()
    device.streams.cache_clear()
    with fake_cupy.Stream(non_blocking=True) as stream:
        yield stream
    # A test may leave copies whose memory has been freed.
    fake_cupy.Stream.null.pending.clear()
    fake_cupy.Stream.made[:] = [fake_cupy.Stream.null]
    device.streams.cache_clear()


def ready(promised: tuple[Any, transfers.Ready]) -> np.ndarray[Any, Any]:
    """Poll until MPI may use the memory, and return the bytes at its address."""
    memory, is_ready = promised
    while not is_ready():
        pass
    assert not fake_cupy.whole
    return at_once((memory, is_ready))


def at_once(promised: tuple[Any, transfers.Ready]) -> np.ndarray[Any, Any]:
    """Return the bytes that MPI would see without polling."""
    memory, _ = promised
    return memory if isinstance(memory, np.ndarray) else memory.memory


def on_device(*values: int) -> Any:
    return fake_cupy.asarray(np.array(values, np.uint8))


def receive(buffer: Any, *values: int) -> None:
    ready(buffer.receivable(len(values)))[...] = values
    buffer.deliver(len(values))


class Kernel:
    """Work that is queued on the current stream, and whether it has run."""

    def __init__(self) -> None:
        self.stream = fake_cupy.get_current_stream()
        self.result = on_device(1, 2) + 1
        self.at = self.stream.end

    @property
    def has_run(self) -> bool:
        return self.stream.done >= self.at


@DEVICE
def test_block_is_written_before_it_is_sent(kind: Kind) -> None:
    buffer = kind(fake_cupy, 4)
    buffer.array[:4] = on_device(0, 1, 2, 3) + 1
    buffer.filled()
    assert ready(buffer.sendable(3)).tolist() == [1, 2, 3]


@DEVICE
def test_kernels_see_received_block(kind: Kind) -> None:
    buffer = kind(fake_cupy, 4)
    receive(buffer, 7, 8)
    assert fake_cupy.asnumpy(buffer.array[:2] + 0).tolist() == [7, 8]


@DEVICE
def test_block_is_read_before_it_is_overwritten(kind: Kind) -> None:
    buffer = kind(fake_cupy, 2)
    receive(buffer, 7, 8)
    reader = buffer.array + 0
    receive(buffer, 1, 2)
    buffer.settle()  # the copy is over, staged
    after = buffer.array + 0
    assert fake_cupy.asnumpy(after).tolist() == [1, 2]
    assert fake_cupy.asnumpy(reader).tolist() == [7, 8]


@DEVICE
def test_host_copy_is_sent_before_it_is_overwritten(kind: Kind) -> None:
    """Two blocks come in before any kernel has run: the first is read all the same."""
    buffer = kind(fake_cupy, 2)
    receive(buffer, 7, 8)
    first = buffer.array + 0
    promised = buffer.receivable(2)
    ready(promised)[...] = 1, 2
    assert fake_cupy.asnumpy(first).tolist() == [7, 8]


@DEVICE
def test_pool_memory_in_use_is_not_reused(kind: Kind) -> None:
    x = on_device(*range(40))
    reader = x + 0
    del x  # its memory is free, and will be read
    buffer = kind(fake_cupy, 40)
    receive(buffer, *range(100, 140))
    buffer.settle()
    after = buffer.array + 0
    assert fake_cupy.asnumpy(after).tolist() == list(range(100, 140))
    assert fake_cupy.asnumpy(reader).tolist() == list(range(40))


@DEVICE
def test_block_is_sent_while_earlier_kernels_run(kind: Kind) -> None:
    buffer = kind(fake_cupy, 2)
    promised = buffer.receivable(2)
    ready(promised)
    attention = Kernel()
    at_once(promised)[...] = 7, 8
    buffer.deliver(2)
    buffer.settle()
    assert ready(buffer.sendable(2)).tolist() == [7, 8]
    assert not attention.has_run


@DEVICE
def test_message_does_not_wait_for_later_kernels(kind: Kind) -> None:
    sent, received = kind(fake_cupy, 2), kind(fake_cupy, 2)
    receive(received, 7, 8)
    received.array + 0
    sent.array[:2] = on_device(3, 4)
    sent.filled()
    leaving, coming = sent.sendable(2), received.receivable(2)
    attention = Kernel()
    assert ready(leaving).tolist() == [3, 4]
    ready(coming)
    assert not attention.has_run


@DEVICE
def test_result_buffer_is_free_once_sent(kind: Kind) -> None:
    buffer = kind(fake_cupy, 2)
    receive(buffer, 1, 2)
    buffer.array[:2] = buffer.array[:2] + 1  # results travel on in the buffer in which they came
    buffer.filled()
    assert ready(buffer.sendable(2)).tolist() == [2, 3]
    attention = Kernel()
    receive(buffer, 7, 8)
    buffer.settle()
    assert not attention.has_run
    assert fake_cupy.asnumpy(buffer.array + 0).tolist() == [7, 8]


def test_staged_next_block_arrives_while_last_is_read() -> None:
    buffer = buffers.StagedBuffer(fake_cupy, 2)
    receive(buffer, 7, 8)
    buffer.array + 1
    attention = Kernel()
    ready(buffer.receivable(2))
    assert not attention.has_run


def test_staged_copies_in_and_out_overlap() -> None:
    block, result = (buffers.StagedBuffer(fake_cupy, 2) for _ in range(2))
    promised = block.receivable(2)
    ready(promised)
    attention = Kernel()
    result.array[:2] = attention.result
    result.filled()
    result.sendable(2)  # after attention, on the stream to the host
    at_once(promised)[...] = 7, 8
    block.deliver(2)
    block.settle()
    assert block.array.memory.tolist() == [7, 8]
    assert not attention.has_run


def test_staged_host_memory_is_released_after_a_pass() -> None:
    buffer = buffers.StagedBuffer(fake_cupy, 2)
    receive(buffer, 7, 8)
    buffer.settle()
    buffer.host[...] = 9
    assert fake_cupy.asnumpy(buffer.array + 0).tolist() == [7, 8]
    assert fake_cupy.whole == {"stream": 1}  # that of asnumpy


def test_numpy_buffers_are_arrays() -> None:
    buffer = buffers.buffer(np, 5)
    assert isinstance(buffer, buffers.HostBuffer)
    for promised in (buffer.sendable(3), buffer.receivable(3)):
        view = ready(promised)
        assert view.size == 3
        assert np.shares_memory(view, buffer.array)
    assert buffer.array.nbytes == 5


@pytest.mark.parametrize("aware", ["0", "1"])
def test_reduction_is_always_staged(aware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", aware)
    assert type(buffers.buffer(fake_cupy, 0)) is KINDS[aware == "0"]
    assert type(buffers.buffer(fake_cupy, 0, direct=False)) is buffers.StagedBuffer


def test_kernel_failure_raises_instead_of_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = buffers.DeviceBuffer(fake_cupy, 1)
    _, is_ready = buffer.receivable(1)
    monkeypatch.setattr(fake_cupy.Event, "failure", 700)
    with pytest.raises(fake_cupy.CUDARuntimeError, match="700"):
        is_ready()


class TestTransfer:
    """Requests that start when their buffers are ready."""

    def test_request_starts_once_when_ready(self) -> None:
        made: list[int] = []
        is_ready = [False, False]

        def start() -> MPI.Request:
            made.append(1)
            return MPI.Request()

        transfer = transfers.Transfer(start, lambda: is_ready[0], lambda: is_ready[1])
        for at in range(2):
            assert not transfer.Test()
            assert not made
            is_ready[at] = True
        assert transfer.Test()
        assert transfer.Test()
        assert made == [1]

    def test_wait_starts_requests_of_the_ring(self) -> None:
        """With a message to oneself that may be sent only later."""
        comm, asked = MPI.COMM_SELF, [0]
        there, here = np.array([5]), np.zeros(1, int)

        def later() -> bool:
            asked[0] += 1
            return asked[0] > 3

        coming = transfers.Transfer(lambda: comm.Irecv(here, 0))
        going = transfers.Transfer(lambda: comm.Isend(there, 0), later)
        waited = transfers.Waited(coming, going.begin)
        assert any(waited.Test() for _ in range(100))
        assert here == 5
        while not going.Test():
            pass


def test_progress_starts_ready_requests() -> None:
    q = np.zeros((1, 1, 3, 4))
    layout = mpi_impl.Layout.agree(q, q, q, MPI.COMM_SELF)
    hop = exchange.Exchange(MPI.COMM_SELF, layout, q)
    blocks = hop.rotation(QUERIES)
    room, is_ready = np.zeros(1, int), [False]
    leg = Leg(0, 0, 1, slice(0, 3), whole=True)
    there, back = (buffers.HostBuffer(0) for _ in range(2))
    blocks.receiving[1], blocks.sending[back] = there, leg
    blocks.pending[there] = transfers.Transfer(lambda: MPI.COMM_SELF.Irecv(room, 0))
    blocks.pending[back] = transfers.Transfer(
        lambda: MPI.COMM_SELF.Isend(np.array([5]), 0), lambda: is_ready[0]
    )
    hop.progress()
    assert room == 0
    is_ready[0] = True
    for _ in range(1000):
        hop.progress()
    assert room == 5
    hop.finish()


def test_single_rank_does_not_query_mpi(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffers, "cuda_aware", None)
    q = fake_cupy.asarray(np.ones((1, 1, 3, 4)))
    out, lse = mpi_impl.cross_attention(q, q, q, MPI.COMM_SELF)
    mpi_impl.cross_attention_backward(out, q, q, q, out, lse, MPI.COMM_SELF)
    assert fake_cupy.asnumpy(out).tolist() == np.ones((1, 1, 3, 4)).tolist()


class TestStreams:
    """Computation is on its own stream, in order with the caller's."""

    def test_device_has_three_non_blocking_streams(self) -> None:
        found = device.streams(fake_cupy, 0)
        assert len({id(stream) for stream in found}) == 3
        assert not any(stream.waits for stream in found)
        assert device.streams(fake_cupy, 0) is found

    def test_streams_are_ordered_with_the_callers(self) -> None:
        x = on_device(1) + 1
        with device.computing(x):
            own = fake_cupy.get_current_stream()
            y = x + 1
        after = Kernel()
        z = y + 1
        assert own is device.streams(fake_cupy, 0).computing
        own.run(own.end)
        assert y.memory.tolist() == [3]
        assert not after.has_run
        assert not fake_cupy.whole
        assert fake_cupy.asnumpy(z).tolist() == [4]

    def test_callers_stream_is_restored_after_an_error(self, own_stream: fake_cupy.Stream) -> None:
        x = on_device(1)

        def fail() -> Any:
            y = x + 1
            results.append(y)
            raise RuntimeError("no")

        results: list[Any] = []
        with pytest.raises(RuntimeError), device.computing(x):
            fail()
        assert fake_cupy.get_current_stream() is own_stream
        assert fake_cupy.asnumpy(results[0] + 1).tolist() == [3]

    def test_numpy_has_no_streams(self) -> None:
        with device.computing(np.zeros(1)):
            pass


class TestMemory:
    """Out-of-memory errors name the purpose, the size and the free memory."""

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (MemoryError, "no"),
            (fake_cupy.CUDARuntimeError, "cudaErrorMemoryAllocation: no"),
            (RuntimeError, "CUDA_ERROR_OUT_OF_MEMORY: no"),
            (RuntimeError, "CUBLAS_STATUS_ALLOC_FAILED"),
        ],
    )
    @pytest.mark.parametrize("aware", ["0", "1"])
    def test_out_of_memory_for_a_buffer(
        self, error: type[Exception], text: str, aware: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of device memory or, staged, of pinned memory."""

        def fail(*args: Any) -> Any:
            raise error(text)

        q = fake_cupy.zeros((1, 1, 3, 4))
        alone = mpi_impl.Layout.agree(q, q, q, MPI.COMM_SELF)
        several = {name: getattr(alone, name) * 2 for name in ("s_q", "s_kv", "masks", "rules")}
        layout = replace(alone, order=(0, 1), **several)
        monkeypatch.setenv("LVXATTN_CUDA_AWARE", aware)
        monkeypatch.setattr(fake_cupy, "empty", fake_cupy.empty if aware == "0" else fail)
        monkeypatch.setattr(fake_cupy.cuda, "alloc_pinned_memory", fail)
        with pytest.raises(error) as raised, device.computing(q):
            lv_xattn(q, q, q, exchange.Exchange(MPI.COMM_SELF, layout, q))
        assert raised.value.__notes__ == [
            "while allocating a buffer of 96 bytes",
            "for the queries of rank 0, the largest block",
            "device 0 has 1,000,000 of 1,000,000,000 bytes free",
        ]

    def test_out_of_memory_for_computing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise MemoryError("Out of memory allocating 12 bytes")

        x = {name: fake_cupy.asarray(part) for name, part in parts().items()}
        monkeypatch.setenv("LVXATTN_CUDA_AWARE", "0")
        monkeypatch.setattr("lvxattn.mpi_impl.lv_xattn.partial_attention", fail)
        with pytest.raises(MemoryError) as raised:
            mpi_impl.cross_attention(x["q"], x["k"], x["v"], MPI.COMM_SELF)
        assert raised.value.__notes__ == [
            "while computing with the queries of rank 0",
            "device 0 has 1,000,000 of 1,000,000,000 bytes free",
            "raised on rank 0 of 1",
        ]


def parts() -> dict[str, Any]:
    problem = Case("alone").make()
    return {name: getattr(problem, name) for name in ("q", "k", "v")}


@pytest.mark.parametrize(("count", "number", "own"), [(1, 3, 0), (4, 3, 3), (2, 3, 1)])
def test_device_by_rank_on_host(
    count: int, number: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One visible device per rank, one for each, and fewer devices than ranks."""
    monkeypatch.setattr(fake_cupy.Device, "count", count)
    monkeypatch.setattr(fake_cupy.Device, "used", -1)
    monkeypatch.setattr(device, "rank_on_host", lambda comm: number)
    assert mpi_impl.use_device(MPI.COMM_SELF, fake_cupy) == own
    assert fake_cupy.Device.used == own


@pytest.mark.parametrize("version", ["13.6.0", "14.0.1"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bfloat16_on_gpu_needs_cupy_support(
    version: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1, getDeviceProperties=lambda device: {"name": b"H"}
    )
    monkeypatch.setattr(fake_cupy, "__version__", version)
    monkeypatch.setattr(fake_cupy.cuda, "runtime", runtime)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    if (version, dtype) == ("13.6.0", "bfloat16"):
        with pytest.raises(InputError, match=r"needs CuPy 14, and here is 13\.6\.0"):
            choose_backend("gpu", dtype, MPI.COMM_SELF)
        assert choose_backend("auto", dtype, MPI.COMM_SELF).xp is np
    else:
        assert choose_backend("gpu", dtype, MPI.COMM_SELF).xp is fake_cupy


def test_ranks_sharing_a_gpu_share_its_memory() -> None:
    mine, other = fake_cupy.Device.pci_bus_id, "0000:0B:00.0"
    on_host = SimpleNamespace(allgather=lambda _: [other, mine, mine], Free=lambda: None)
    comm: Any = SimpleNamespace(Split_type=lambda _: on_host)
    assert Probe(comm, (1, 1, 1), "float32", fake_cupy).room == 10**9 / 2


def test_single_rank_on_a_host_is_rank_0_there() -> None:
    assert device.rank_on_host(MPI.COMM_SELF) == 0


def test_blas_threads_from_environment_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from threadpoolctl import threadpool_info

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    before = max(pool["num_threads"] for pool in pools)
    assert device.limit_blas_threads(MPI.COMM_SELF) == before


class TestFakeDevice:
    """Properties of fake_cupy that the tests depend on."""

    def test_fake_device_is_asynchronous(self) -> None:
        ones = fake_cupy.asarray(np.ones(2))
        x = ones + 1
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

    def test_pinned_copies_are_asynchronous(self) -> None:
        stream = fake_cupy.Stream(non_blocking=True)
        pinned = np.frombuffer(fake_cupy.cuda.alloc_pinned_memory(2), np.uint8, 2)
        address, x = ctypes.c_void_p(pinned.ctypes.data), on_device(1, 2)
        stream.wait_event(device.event(fake_cupy))
        x.data.copy_to_host_async(address, 2, stream)
        assert pinned.tolist() == [255, 255]
        stream.synchronize()
        assert pinned.tolist() == [1, 2]
        address = ctypes.c_void_p(np.zeros(2, np.uint8).ctypes.data)
        x.data.copy_to_host_async(address, 2, stream)
        with pytest.raises(RuntimeError, match="not pinned"):
            stream.synchronize()
        stream.pending.clear()

    def test_streams_wait_for_events_only(self, own_stream: fake_cupy.Stream) -> None:
        x = on_device(1) + 1
        with fake_cupy.Stream(non_blocking=True) as careless:
            early = x + 1
            careless.synchronize()
        with fake_cupy.Stream(non_blocking=True) as careful:
            careful.wait_event(own_stream.record(fake_cupy.Event()))
            right = x + 1
        later = Kernel()
        careful.synchronize()
        assert (early.memory[0], right.memory[0]) == (0, 3)
        assert not later.has_run
        assert fake_cupy.whole == {"stream": 2}

    def test_default_stream_waits_for_blocking_streams(self, own_stream: fake_cupy.Stream) -> None:
        with fake_cupy.Stream() as blocking:
            x = on_device(1) + 1
        on_own = Kernel()
        with fake_cupy.Stream.null:
            y = x + 1
        with blocking:
            z = y + 1
        blocking.synchronize()
        assert z.memory.tolist() == [4]
        assert not on_own.has_run

    def test_event_query_makes_progress(self) -> None:
        before, event, after = Kernel(), device.event(fake_cupy), Kernel()
        assert not before.has_run
        assert [event.done, event.done] == [False, True]
        assert before.has_run
        assert not after.has_run

    @pytest.mark.parametrize(
        "mix",
        [
            np.asarray, np.exp, lambda x: x + np.ones(2), lambda x: np.ones(2) + x,
            lambda x: np.concatenate([x, x]), lambda x: fake_cupy.where(x > 0, np.ones(2), x),
            lambda x: x.__setitem__(..., np.ones(2)), lambda x: x[np.array([0])],
        ],
    )  # fmt: skip
    def test_fake_arrays_do_not_mix_with_numpy(self, mix: Any) -> None:
        with pytest.raises(TypeError):
            mix(fake_cupy.asarray(np.ones(2)))

    def test_mpi_accesses_fake_memory(self) -> None:
        x, y = fake_cupy.asarray(np.arange(3.0)), fake_cupy.empty(3)
        fake_cupy.get_current_stream().synchronize()
        MPI.COMM_SELF.Sendrecv([x, MPI.DOUBLE], 0, recvbuf=[y, MPI.DOUBLE], source=0)
        assert fake_cupy.asnumpy(y).tolist() == [0, 1, 2]
