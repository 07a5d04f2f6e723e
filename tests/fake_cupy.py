"""A device array library in host memory that behaves like CuPy: everything on it runs late.

Kernels and copies wait in a queue, their stream, and run when something waits for them: only those,
and what events or the default stream put before them.  Until then a result holds garbage, and a
source that is overwritten too early gives the kernel the wrong bytes: what a program forgets to
wait for, it sees.  Memory that is freed is given out again at once, on the stream that it was made
on, as CuPy does; what still uses it there comes first, what uses it elsewhere comes too late.
Nothing converts to a NumPy array by itself.

An event that is asked whether it has passed says no, and then the work before it runs.
`whole` counts how often somebody waited for all of a stream.

    x = fake_cupy.asarray(host)      back = fake_cupy.asnumpy(x)

`lvxattn.mpi_impl` takes the module from an array's type, and finds this one as ``fake_cupy``.
"""

import ctypes
import operator
import sys
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy import float32, float64, inf, uint8  # noqa: F401  (CuPy has NumPy's)

sys.modules["fake_cupy"] = sys.modules[__name__]
__version__ = "14"


whole: Counter[str] = Counter()


class Stream:
    """Queued work, in order; `done` of it has run."""

    null: "Stream"
    current: "list[Stream]"
    made: "list[Stream]"

    def __init__(self, non_blocking: bool = False) -> None:
        self.pending: list[Callable[[], None]] = []
        self.done = 0
        self.free: dict[int, list[Any]] = {}  # memory by its size
        self.waits = not non_blocking
        Stream.made.append(self)

    def __enter__(self) -> "Stream":
        Stream.current.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        Stream.current.pop()

    @property
    def end(self) -> int:
        return self.done + len(self.pending)

    def launch(self, work: Callable[[], None]) -> None:
        """Queue a kernel or a copy; returns at once.

        The default stream waits for all streams that were not made non-blocking, and they for it.
        """
        if self is Stream.null:
            for other in Stream.made:
                if other.waits and other is not self:
                    self._wait(other, other.end)
        elif self.waits:
            self._wait(Stream.null, Stream.null.end)
        self.pending.append(work)

    def wait_event(self, event: "Event") -> None:
        """Let nothing that follows run before what the event marks now."""
        self._wait(event.stream, event.at)

    def _wait(self, other: "Stream", at: int) -> None:
        self.pending.append(lambda: other.run(at))

    def run(self, until: int) -> None:
        """Run what was queued, up to the `until`-th work since the beginning."""
        with np.errstate(all="ignore"):  # a device gives no warnings
            while self.done < until:
                self.pending.pop(0)()
                self.done += 1

    def record(self, event: "Event") -> "Event":
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Run all that was queued."""
        whole["stream"] += 1
        self.run(self.end)


Stream.made = []
Stream.null = stream = Stream()
Stream.current = [stream]


def get_current_stream() -> Stream:
    return Stream.current[-1]


class Event:
    """A mark in a stream; before `record` there is nothing to wait for."""

    failure = 0  # what a kernel has failed with

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.stream, self.at, self.ptr = stream, 0, id(self)
        _events[self.ptr] = self

    def record(self, stream: Stream | None = None) -> None:
        """Mark the end of what has been queued so far."""
        self.stream = get_current_stream() if stream is None else stream
        self.at = self.stream.end

    @property
    def done(self) -> bool:
        """Whether it had passed before this query."""
        passed = self.stream.done >= self.at
        self.stream.run(self.at)
        return passed

    def synchronize(self) -> None:
        """Wait for what was queued before the mark."""
        self.stream.run(self.at)


_events: "WeakValueDictionary[int, Event]" = WeakValueDictionary()
_pinned: "WeakValueDictionary[int, Any]" = WeakValueDictionary()


def _alloc_pinned_memory(size: int) -> memoryview:
    memory = np.full(size, 0xFF, np.uint8)
    _pinned[memory.ctypes.data] = memory
    return memoryview(memory)


class CUDARuntimeError(RuntimeError):
    """The error of a call of CUDA."""


def _event_query(ptr: int) -> int:
    return Event.failure or (0 if _events[ptr].done else 600)


class Device:
    """A device; all arrays are on number 0."""

    count = 1
    used = 0
    mem_info = 10**6, 10**9
    pci_bus_id = "0000:0A:00.0"

    def __init__(self, device: int = 0) -> None:
        self.id = device

    def use(self) -> None:
        Device.used = self.id

    def synchronize(self) -> None:
        whole["device"] += 1
        for each in Stream.made:
            each.run(each.end)

    def __enter__(self) -> "Device":
        if self.id != 0:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return self

    def __exit__(self, *error: Any) -> None:
        pass


cuda = SimpleNamespace(
    Event=Event,
    Device=Device,
    Stream=Stream,
    alloc_pinned_memory=_alloc_pinned_memory,
    get_current_stream=get_current_stream,
    runtime=SimpleNamespace(
        eventQuery=_event_query,
        getDeviceCount=lambda: Device.count,
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13010,
        CUDARuntimeError=CUDARuntimeError,
    ),
)


class Allocation:
    """Memory of a stream's pool, returned to it with the last array that uses it.

    What is queued and still uses it does not keep it.
    """

    def __init__(self, nbytes: int) -> None:
        self.stream = get_current_stream()
        free = self.stream.free.get(nbytes)
        if free:
            memory = free.pop()
            # Whatever is written there next on this stream; other streams do not wait for it.
            self.stream.launch(lambda: memory.fill(0xFF))
        else:
            memory = np.full(nbytes, 0xFF, np.uint8)
        self.memory = memory

    def __del__(self) -> None:
        self.stream.free.setdefault(self.memory.size, []).append(self.memory)


class MemoryPointer:
    """The address of an array, for copies."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def copy_to_host_async(self, mem: ctypes.c_void_p, size: int, stream: Stream) -> None:
        """Copy to pinned memory, when the stream comes to it."""
        device = self.memory.reshape(-1).view(np.uint8)
        if size:  # CuPy, too, queues nothing else
            stream.launch(lambda: np.copyto(_host(mem)[:size], device[:size]))

    def copy_from_host_async(self, mem: ctypes.c_void_p, size: int, stream: Stream) -> None:
        """Copy from pinned memory, when the stream comes to it."""
        device = self.memory.reshape(-1).view(np.uint8)
        if size:
            stream.launch(lambda: np.copyto(device[:size], _host(mem)[:size]))


def _host(address: ctypes.c_void_p) -> Any:
    if address.value not in _pinned:
        raise RuntimeError("memory of the host that is not pinned, or not any more")
    return _pinned[address.value]


class ndarray:  # noqa: N801
    """An array in device memory; `memory` is what a library that is given its address sees.

    `allocation` is where it lies: every view keeps it.
    """

    __module__ = "fake_cupy"
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, memory: np.ndarray[Any, Any], allocation: Any = None) -> None:
        self.memory, self.allocation = memory, allocation
        self.shape, self.dtype, self.strides = memory.shape, memory.dtype, memory.strides
        self.ndim, self.size, self.nbytes = memory.ndim, memory.size, memory.nbytes
        self.itemsize = memory.itemsize

    @property
    def device(self) -> Device:
        return Device()

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self.memory)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        contiguous = self.memory.flags.c_contiguous
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.memory.ctypes.data, False),
            "version": 4,
            "strides": None if contiguous else self.strides,
            "stream": 1,
        }

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`.")

    def __array_ufunc__(self, ufunc: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"Unsupported type: numpy.{ufunc.__name__} with a device array")

    def __array_function__(self, function: Any, *args: Any) -> Any:
        raise TypeError(f"Unsupported type: numpy.{function.__name__} with a device array")

    def get(self) -> Any:
        """Copy to the host, after all that was queued on the current stream."""
        get_current_stream().synchronize()
        return self.memory.copy()

    def __reduce__(self) -> Any:
        return asarray, (self.get(),)

    def __repr__(self) -> str:
        return f"fake_cupy.{self.get()!r}"

    def __len__(self) -> int:
        return len(self.memory)

    def __bool__(self) -> bool:
        return bool(self.get())

    def __float__(self) -> float:
        return float(self.get())

    # Views: no kernel.

    def __getitem__(self, key: Any) -> "ndarray":
        return ndarray(self.memory[_basic(key)], self.allocation)

    def reshape(self, *shape: Any) -> "ndarray":
        try:
            return ndarray(self.memory.reshape(*shape, copy=False), self.allocation)
        except ValueError:
            return _kernel(lambda x: x.reshape(*shape), self)

    def swapaxes(self, axis1: int, axis2: int) -> "ndarray":
        return ndarray(self.memory.swapaxes(axis1, axis2), self.allocation)

    def view(self, dtype: Any) -> "ndarray":
        return ndarray(self.memory.view(dtype), self.allocation)

    # Kernels.

    def __setitem__(self, key: Any, value: Any) -> None:
        _kernel(_same, value, out=self[key])

    def astype(self, dtype: Any, copy: bool = True) -> "ndarray":
        if self.dtype == dtype and not copy:
            return self
        return _kernel(np.ndarray.astype, self, dtype=np.dtype(dtype))

    def copy(self) -> "ndarray":
        return self.astype(self.dtype)

    def sum(self, axis: Any = None) -> "ndarray":
        return _kernel(np.sum, self, axis=axis)

    def any(self, axis: Any = None) -> "ndarray":
        return _kernel(np.any, self, axis=axis)

    def max(self, axis: Any = None) -> "ndarray":
        return _kernel(np.max, self, axis=axis)


def _operator(name: str) -> None:
    function = getattr(operator, f"__{name}__")
    setattr(ndarray, f"__{name}__", lambda *args: _kernel(function, *args))
    if hasattr(operator, f"__i{name}__"):
        setattr(ndarray, f"__r{name}__", lambda a, b: _kernel(function, b, a))
        setattr(ndarray, f"__i{name}__", lambda a, b: _kernel(function, a, b, out=a))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "and", "or"):
    _operator(_name)
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "abs"):
    _operator(_name)


def _elementwise(function: Any) -> Callable[..., ndarray]:
    return lambda *args, out=None: _kernel(function, *args, out=out)


exp, log, maximum, matmul = (_elementwise(f) for f in (np.exp, np.log, np.maximum, np.matmul))


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Return garbage: NaN in every floating dtype, or what was there."""
    dtype = np.dtype(dtype)
    size = shape if isinstance(shape, int) else prod(shape)
    allocation = Allocation(int(size) * dtype.itemsize)
    return ndarray(allocation.memory.view(dtype).reshape(shape), allocation)


def full(shape: Any, fill_value: Any, dtype: Any = None) -> ndarray:
    shape = tuple(shape) if isinstance(shape, list) else shape
    return _kernel(np.full, shape=shape, fill_value=fill_value, dtype=dtype)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 0, dtype)


def zeros_like(a: ndarray) -> ndarray:
    return zeros(a.shape, a.dtype)


def ones_like(a: ndarray) -> ndarray:
    return full(a.shape, 1, a.dtype)


def arange(start: Any, stop: Any = None) -> ndarray:
    return _kernel(np.arange, *((start,) if stop is None else (start, stop)))


def searchsorted(a: ndarray, v: ndarray, side: str = "left") -> ndarray:
    return _kernel(np.searchsorted, a, v, side=side)


def where(condition: ndarray, x: Any, y: Any) -> ndarray:
    return _kernel(np.where, condition, x, y)


def copyto(dst: ndarray, src: Any, where: Any = True) -> None:
    _kernel(np.where, where, src, dst, out=dst)


def tensordot(a: ndarray, b: ndarray, axes: Any = 2) -> ndarray:
    return _kernel(np.tensordot, a, b, axes=axes)


def moveaxis(a: ndarray, source: int, destination: int) -> ndarray:
    return ndarray(np.moveaxis(a.memory, source, destination), a.allocation)


Device.compute_capability = "75"  # too old for the kernels of mpi_impl, unless a test says not


def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    return ndarray(np.broadcast_to(array.memory, shape), array.allocation)


def split(ary: ndarray, indices_or_sections: Any, axis: int = 0) -> list[ndarray]:
    parts = np.split(ary.memory, indices_or_sections, axis)
    return [ndarray(x, ary.allocation) for x in parts]


def ones(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 1, dtype)


def concatenate(tup: Any, axis: int = 0) -> ndarray:
    return _kernel(_join, *tup, axis=axis)


def asarray(a: Any) -> ndarray:
    """Copy a NumPy array to the device, when the current stream comes to it."""
    if isinstance(a, ndarray):
        return a
    host = np.array(a, order="C")  # CuPy, too, keeps a copy of its own until then
    result = empty(host.shape, host.dtype)
    there = result.memory
    _launch(lambda: np.copyto(there, host))
    return result


def ascontiguousarray(a: ndarray) -> ndarray:
    return a if a.memory.flags.c_contiguous else _kernel(np.ascontiguousarray, a)


def asnumpy(a: ndarray) -> Any:
    """Copy a device array to the host, after all that was queued."""
    return a.get()


def _launch(work: Callable[[], None]) -> None:
    get_current_stream().launch(work)


def _kernel(
    function: Callable[..., Any], *args: Any, out: ndarray | None = None, **options: Any
) -> ndarray:
    """Queue ``function(*args, **options)``; the result array exists at once."""
    for x in args:
        if not isinstance(x, ndarray | bool | int | float | np.generic):
            raise TypeError(f"Unsupported type {type(x)}")
    kinds = [(x.shape, x.dtype) if isinstance(x, ndarray) else x for x in args]
    kind = _kind(function, *kinds, **options)
    result = empty(*kind) if out is None else out
    values = [x.memory if isinstance(x, ndarray) else x for x in args]
    there = result.memory  # alone: what is queued does not keep an array
    _launch(lambda: np.copyto(there, function(*values, **options), casting="same_kind"))
    return result


@lru_cache(10_000, typed=True)
def _kind(function: Callable[..., Any], *kinds: Any, **options: Any) -> tuple[Any, Any]:
    """Return shape and dtype of the result for arrays of these kinds, by a call with ones."""
    args = (np.broadcast_to(np.ones((), x[1]), x[0]) if isinstance(x, tuple) else x for x in kinds)
    with np.errstate(all="ignore"):
        like = np.asarray(function(*args, **options))
    return like.shape, like.dtype


def _same(x: Any) -> Any:
    return x


def _join(*parts: Any, axis: int) -> Any:
    return np.concatenate(parts, axis)


def _basic(key: Any) -> Any:
    """Return the key of a view: slices, numbers, axes, and an ellipsis that keeps it an array."""
    key = key if isinstance(key, tuple) else (key,)
    if not all(k is None or k is Ellipsis or isinstance(k, int | slice) for k in key):
        raise TypeError(f"Only views are made here, got the index {key}")
    return key if Ellipsis in key else (*key, ...)
