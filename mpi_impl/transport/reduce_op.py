"""The merge as an `MPI.Op`, on partial results packed in rows.

A row holds the partial result of one query: out, top and total.  On a device kernels pack rows; the
operator runs on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from mpi4py import MPI

from .buffers import Buffer
from .transfers import Ready

Array = Any


class Rows:
    """Rows of one or several ranks' partial results, in host memory, where MPI calls the operator.

    Parameters
    ----------
    buffer : callable
        Returns a buffer of a number of bytes; ``direct=False``: in host memory, for MPI.
    like : sequence of (B, H, s_q, ...)
        Arrays of one dtype and, but for s_q, of the shapes to be packed.
    lengths : sequence of int
        The number of queries of each part.
    """

    def __init__(
        self, buffer: Callable[..., Buffer], like: Sequence[Array], lengths: Sequence[int]
    ) -> None:
        self.like, self.lengths = like, lengths
        self.columns, width = _columns(like)
        self.counts = [prod(like[0].shape[:2]) * length for length in lengths]
        *self.starts, count = accumulate(self.counts, initial=0)
        self.row_bytes = width * like[0].dtype.itemsize
        self.nbytes = count * self.row_bytes
        self.buffer = buffer(self.nbytes, direct=False)
        whole = self.buffer.array[: self.nbytes].view(like[0].dtype)
        self.rows = whole.reshape(count, width)  # (B H S_Q, width)

    def put(self, part: int, arrays: Sequence[Array]) -> None:
        """Pack one part."""
        rows = self._part(part)
        for column, x in zip(self.columns, arrays, strict=True):
            view = rows[column]
            view[...] = x.reshape(view.shape)  # (B H s_q, ...)

    def sendable(self) -> tuple[Array, Ready]:
        """Return the rows for MPI, after all parts have been packed."""
        self.buffer.filled()
        return self.buffer.sendable(self.nbytes)

    def receivable(self) -> tuple[Array, Ready]:
        """Return the memory that MPI receives into."""
        return self.buffer.receivable(self.nbytes)

    def arrays(self) -> tuple[Array, ...]:
        """Unpack what MPI has received, one part."""
        self.buffer.deliver(self.nbytes)
        self.buffer.settle()
        (length,) = self.lengths
        return tuple(
            # (B, H, s_q, ...)
            self.rows[column].reshape(*x.shape[:2], length, *x.shape[3:]).copy()
            for column, x in zip(self.columns, self.like, strict=True)
        )

    def _part(self, part: int) -> Array:
        start = self.starts[part]
        return self.rows[start : start + self.counts[part]]


@contextmanager
def operator(
    join: Callable[..., tuple[Array, ...]], arrays: Sequence[Array]
) -> Iterator[tuple[MPI.Op, MPI.Datatype]]:
    """Create the MPI.Op that joins rows, and the datatype of a row; free both at the end."""
    dtype, columns, width = np.dtype(str(arrays[0].dtype)), *_columns(arrays)

    def joined(a: Any, b: Any, _: MPI.Datatype) -> None:
        rows_a, rows_b = (np.frombuffer(x, dtype).reshape(-1, width) for x in (a, b))  # (n, width)
        result = join(*(rows_a[c] for c in columns), *(rows_b[c] for c in columns))
        for column, x in zip(columns, result, strict=True):
            rows_b[column] = x  # MPI expects the result in the second argument

    row = MPI.Datatype.fromcode(dtype.char).Create_contiguous(width).Commit()
    op = MPI.Op.Create(joined, commute=True)
    try:
        yield op, row
    finally:
        op.Free()
        row.Free()


def _columns(arrays: Sequence[Array]) -> tuple[list[Any], int]:
    """Return the columns of each array in a row, and the length of a row."""
    columns: list[Any] = []
    end = 0
    for x in arrays:
        wide = len(x.shape) == 4
        columns.append(np.s_[:, end : end + x.shape[3]] if wide else np.s_[:, end])
        end += x.shape[3] if wide else 1
    return columns, end
