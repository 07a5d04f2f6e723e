"""A device array library over host memory that behaves like CuPy: everything on it runs late.

Kernels and copies wait in a queue, the stream, and run when something synchronises.  Until then a
result holds garbage, and a source that is overwritten too early gives the kernel the wrong bytes:
what a program forgets to wait for, it sees.  Nothing converts to a NumPy array by itself.

    x = fake_cupy.asarray(host)      back = fake_cupy.asnumpy(x)

`lvxattn.mpi_impl` takes the module from an array's type, and finds this one as ``fake_cupy``.
"""

import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy import float32, float64, inf, uint8  # noqa: F401  (CuPy has NumPy's)

sys.modules["fake_cupy"] = sys.modules[__name__]
__version__ = "14"


class Stream:
    """Work that the device was given, in order; `done` of it has run."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []
        self.done = 0

    def launch(self, work: Callable[[], None]) -> None:
        """Queue a kernel or a copy; returns at once."""
        self.pending.append(work)

    def run(self, until: int) -> None:
        """Run what was queued, up to the `until`-th work since the beginning."""
        with np.errstate(all="ignore"):  # a device gives no warnings
            while self.done < until:
                self.done += 1
                self.pending.pop(0)()

    def synchronize(self) -> None:
        """Run all that was queued."""
        self.run(self.done + len(self.pending))


stream = Stream()


class Event:
    """A mark in the stream; without `record` there is nothing to wait for."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.at = 0

    def record(self, stream_: Stream = stream) -> None:
        """Mark the end of what has been queued so far."""
        self.at = stream_.done + len(stream_.pending)

    def synchronize(self) -> None:
        """Wait for what was queued before the mark."""
        stream.run(self.at)


def _alloc_pinned_memory(size: int) -> memoryview:
    return memoryview(np.full(size, 0xFF, np.uint8))


class Device:
    """The only device there is: number 0."""

    def __init__(self, device: int = 0) -> None:
        self.id = device

    def __enter__(self) -> "Device":
        if self.id != 0:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return self

    def __exit__(self, *error: Any) -> None:
        pass


cuda = SimpleNamespace(
    Event=Event,
    Device=Device,
    alloc_pinned_memory=_alloc_pinned_memory,
    get_current_stream=lambda: stream,
)


class ndarray:  # noqa: N801
    """An array in device memory; `memory` is what a library that is given its address sees."""

    __module__ = "fake_cupy"
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self.memory = memory
        self.shape, self.dtype, self.strides = memory.shape, memory.dtype, memory.strides
        self.ndim, self.size, self.nbytes = memory.ndim, memory.size, memory.nbytes
        self.itemsize, self.device = memory.itemsize, Device()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        contiguous = self.memory.flags.c_contiguous
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.memory.ctypes.data, False),
            "version": 3,
            "strides": None if contiguous else self.strides,
            "stream": 1,
        }

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`.")

    def __array_ufunc__(self, ufunc: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"Unsupported type: numpy.{ufunc.__name__} with a device array")

    def __array_function__(self, function: Any, *args: Any) -> Any:
        raise TypeError(f"Unsupported type: numpy.{function.__name__} with a device array")

    def get(self, stream: Any = None, order: str = "C", out: Any = None) -> Any:
        """Copy to the host: at once, but into a given array only when the stream comes to it."""
        if out is None:
            _wait()
            return self.memory.copy()
        if not isinstance(out, np.ndarray) or (out.shape, out.dtype) != (self.shape, self.dtype):
            raise TypeError(f"out: expected a NumPy array {self.shape} of {self.dtype}")
        _launch(lambda: np.copyto(out, self.memory))
        return out

    def set(self, arr: Any, stream: Any = None) -> None:
        """Copy from the host, when the stream comes to it."""
        if not isinstance(arr, np.ndarray) or (arr.shape, arr.dtype) != (self.shape, self.dtype):
            raise TypeError(f"arr: expected a NumPy array {self.shape} of {self.dtype}")
        _launch(lambda: np.copyto(self.memory, arr))

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
        return ndarray(self.memory[_basic(key)])

    def reshape(self, *shape: Any) -> "ndarray":
        try:
            return ndarray(self.memory.reshape(*shape, copy=False))
        except ValueError:
            return _kernel(lambda x: x.reshape(*shape), self)

    def swapaxes(self, axis1: int, axis2: int) -> "ndarray":
        return ndarray(self.memory.swapaxes(axis1, axis2))

    def view(self, dtype: Any) -> "ndarray":
        return ndarray(self.memory.view(dtype))

    # Kernels.

    def __setitem__(self, key: Any, value: Any) -> None:
        _kernel(lambda x: x, value, out=self[key])

    def astype(self, dtype: Any, copy: bool = True) -> "ndarray":
        if self.dtype == dtype and not copy:
            return self
        return _kernel(lambda x: x.astype(dtype), self)

    def sum(self, axis: Any = None) -> "ndarray":
        return _kernel(lambda x: x.sum(axis=axis), self)

    def max(self, axis: Any = None) -> "ndarray":
        return _kernel(lambda x: x.max(axis=axis), self)


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


exp, log, logaddexp, matmul = (_elementwise(f) for f in (np.exp, np.log, np.logaddexp, np.matmul))


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Return garbage: NaN in every floating dtype."""
    memory: Any = np.empty(shape, dtype)
    memory.reshape(-1).view(np.uint8)[...] = 0xFF
    return ndarray(memory)


def full(shape: Any, fill_value: Any, dtype: Any = None) -> ndarray:
    return _kernel(lambda: np.full(shape, fill_value, dtype))


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 0, dtype)


def zeros_like(a: ndarray) -> ndarray:
    return zeros(a.shape, a.dtype)


def arange(start: Any, stop: Any = None) -> ndarray:
    return _kernel(lambda: np.arange(start, stop))


def where(condition: ndarray, x: Any, y: Any) -> ndarray:
    return _kernel(np.where, condition, x, y)


def copyto(dst: ndarray, src: Any, where: Any = True) -> None:
    _kernel(lambda s, w, d: np.where(w, s, d), src, where, dst, out=dst)


def tensordot(a: ndarray, b: ndarray, axes: Any = 2) -> ndarray:
    return _kernel(lambda a, b: np.tensordot(a, b, axes), a, b)


def moveaxis(a: ndarray, source: int, destination: int) -> ndarray:
    return ndarray(np.moveaxis(a.memory, source, destination))


Device.compute_capability = "75"  # too old for the kernels of mpi_impl, unless a test says not


def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    return ndarray(np.broadcast_to(array.memory, shape))


def split(ary: ndarray, indices_or_sections: Any, axis: int = 0) -> list[ndarray]:
    return [ndarray(x) for x in np.split(ary.memory, indices_or_sections, axis)]


def ones(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 1, dtype)


def concatenate(tup: Any, axis: int = 0) -> ndarray:
    return _kernel(lambda *parts: np.concatenate(parts, axis), *tup)


def asarray(a: Any) -> ndarray:
    """Copy a NumPy array to the device."""
    return a if isinstance(a, ndarray) else ndarray(np.array(a, order="C"))


def asnumpy(a: ndarray) -> Any:
    """Copy a device array to the host, after all that was queued."""
    return a.get()


_launch, _wait = stream.launch, stream.synchronize


def _kernel(function: Callable[..., Any], *args: Any, out: ndarray | None = None) -> ndarray:
    """Queue ``function(*args)``; where to, and of which shape, is known at once."""
    for x in args:
        if not isinstance(x, ndarray | bool | int | float | np.generic):
            raise TypeError(f"Unsupported type {type(x)}")
    with np.errstate(all="ignore"):
        like = function(*(_ones(x) if isinstance(x, ndarray) else x for x in args))
    result = empty(np.shape(like), np.asarray(like).dtype) if out is None else out
    values = [x.memory if isinstance(x, ndarray) else x for x in args]
    _launch(lambda: np.copyto(result.memory, function(*values), casting="same_kind"))
    return result


def _ones(x: ndarray) -> Any:
    return np.broadcast_to(np.ones((), x.dtype), x.shape)


def _basic(key: Any) -> Any:
    """Return the key of a view: slices, numbers, axes, and an ellipsis that keeps it an array."""
    key = key if isinstance(key, tuple) else (key,)
    if not all(k is None or k is Ellipsis or isinstance(k, int | slice) for k in key):
        raise TypeError(f"Only views are made here, got the index {key}")
    return key if Ellipsis in key else (*key, ...)
