"""Read and write tensors in safetensors files, slice by slice.

    8 bytes            n, little-endian
    n bytes            JSON: {"q": {"dtype": "BF16", "shape": [...], "data_offsets": [from, to]}}
    the rest           the tensors' bytes, C order, little-endian

A slice along an axis of a tensor in C order is one run of bytes for every index of the axes before
it.  Every rank reads and writes the runs of its own slice only.

Format: https://huggingface.co/docs/safetensors
"""

import errno
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedWriter, FileIO
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from lvxattn.common.regular_file import open_regular, printable

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in _NAMES.items()}
_LARGEST_HEADER = 100_000_000  # the format's own limit
_MOST_AXES = 32  # NumPy's, before version 2


class InputError(ValueError):
    """Invalid input from the user."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes
    ----------
    dtype : str
    shape : tuple of int
    start : int
        Offset of its first byte in the file.
    """

    dtype: str
    shape: Shape
    start: int

    @property
    def end(self) -> int:
        """Offset of the byte after its last; `start` for an unknown dtype."""
        known = self.dtype in _CODES
        return self.start + (prod(self.shape) * dtype_of(self.dtype).itemsize if known else 0)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file and the tensors in it."""

    path: str
    tensors: dict[str, Tensor]

    def read(self, name: str, axis: int, part: slice) -> Array:
        """Read a slice of a tensor along one axis.

        Raises
        ------
        InputError, OSError
            The file is truncated, cannot be read, or has no array of that name that NumPy can hold.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in _CODES or not tensor.shape:
            found = f"{tensor.dtype} of shape {tensor.shape}"
            raise InputError(f"{self.path}: {name}: expected {', '.join(_NAMES)}, got {found}")
        x = np.empty(_cut(tensor.shape, axis, part), dtype_of(tensor.dtype))
        with open_regular(self.path) as file:
            for start, run in _runs(x, tensor, axis, part):
                file.seek(start)
                _fill(file, run, name, self.path)
        return x

    def write(self, name: str, axis: int, part: slice, x: Array) -> None:
        """Write a slice of a tensor into a file that `create` made."""
        tensor = self.tensors[name]
        with open(self.path, "r+b", buffering=0) as file:
            for start, run in _runs(np.ascontiguousarray(x), tensor, axis, part):
                file.seek(start)
                while run:
                    run = run[file.write(run) :]

    def sync(self) -> None:
        """Wait until what was written on this host is on the disk."""
        with open(self.path, "r+b", buffering=0) as file:
            os.fsync(file.fileno())


def dtype_of(name: str) -> Any:
    """Return NumPy's dtype of this name.

    Raises
    ------
    InputError
        bfloat16 needs ml_dtypes, which is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise InputError("bfloat16: needs ml_dtypes: pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def open_tensors(path: str) -> TensorFile:
    """Read the header of a file.

    Raises
    ------
    InputError
        The file is not a safetensors file, or is damaged.
    OSError
        The file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(_LARGEST_HEADER, size - 8):
            raise InputError(f"{path}: not a safetensors file, or cut short: no complete header")
        text = file.read(length)
    if len(text) < length:
        raise InputError(f"{path}: cut short while the header was read")
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise TypeError("no table of tensors")
        header.pop("__metadata__", None)
        tensors = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = printable(f"{type(error).__name__} {error}")
        raise InputError(f"{path}: damaged header: {what}") from None
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise InputError(f"{path}: cut short: {name} ends at byte {tensor.end:,} of {size:,}")
    places = sorted((t.start, t.end, name) for name, t in tensors.items())
    for (_, end, name), (start, _, following) in pairwise(places):
        if start < end:
            raise InputError(f"{path}: damaged header: {name} and {following} overlap")
    return TensorFile(path, tensors)


def create(
    file: BufferedWriter, shapes: dict[str, tuple[str, Shape]], notes: dict[str, str]
) -> TensorFile:
    """Give an empty file its header, and its final size.

    Parameters
    ----------
    file : file
        From `new_file`.
    shapes : dict
        Dtype and shape, by name.
    notes : dict
        The file's metadata.

    Raises
    ------
    OSError
        There is no space for it.
    """
    header: dict[str, Any] = {"__metadata__": notes}
    start, tensors = 0, {}
    # Wide dtypes first, so that every tensor is aligned without gaps.
    for name in sorted(shapes, key=lambda name: (-dtype_of(shapes[name][0]).itemsize, name)):
        dtype, shape = shapes[name]
        tensors[name] = Tensor(dtype, shape, start)
        end = tensors[name].end
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    file.write(struct.pack("<Q", len(text)) + text)
    file.flush()
    _reserve(file.fileno(), base + start)
    return TensorFile(file.name, {n: replace(t, start=base + t.start) for n, t in tensors.items()})


def _reserve(descriptor: int, size: int) -> None:
    """Set the size of a file, and fail on a full disk now rather than after the work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)  # the file system cannot reserve space


def _tensor(name: str, entry: Any, base: int) -> Tensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not isinstance(dtype, str) or printable(name + dtype) != name + dtype:
        raise ValueError(f"a tensor {name!r:.80} of {dtype!r:.80}")
    dtype = _NAMES.get(dtype, dtype)
    start, end = entry["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))  # True is an int, too
    if whole and (len(shape) > _MOST_AXES or 8 * prod(n for n in shape if n) >= 2**63):
        raise ValueError(f"{name}: no array has shape {list(shape)!r:.80}")
    if not whole or (dtype in _CODES and Tensor(dtype, shape, start).end != end):
        raise ValueError(f"{dtype} {list(shape)!r:.80} does not take bytes {start} to {end}")
    return Tensor(dtype, shape, base + start)


def _cut(shape: Shape, axis: int, part: slice) -> Shape:
    axis %= len(shape)
    return *shape[:axis], part.stop - part.start, *shape[axis + 1 :]


def _runs(x: Array, tensor: Tensor, axis: int, part: slice) -> Iterator[tuple[int, memoryview]]:
    """Yield the offset in the file and the bytes of each run of a slice."""
    axis %= len(tensor.shape)
    row = prod(tensor.shape[axis + 1 :]) * x.itemsize
    stride, length = tensor.shape[axis] * row, (part.stop - part.start) * row
    content = memoryview(x.reshape(-1).view(np.uint8).data)
    for n in range(prod(tensor.shape[:axis]) if length else 0):
        start = tensor.start + n * stride + part.start * row
        yield start, content[n * length : (n + 1) * length]


def _fill(file: FileIO, run: memoryview, name: str, path: str) -> None:
    while run:
        got = file.readinto(run)
        if not got:
            raise InputError(f"{path}: cut short while {name} was read")
        run = run[got:]
