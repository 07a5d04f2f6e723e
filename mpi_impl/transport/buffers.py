r"""Buffers shared by an asynchronous device and MPI, which does not know about its streams.

A rotation has two buffers, the current block's and the next block's.  NumPy's are host memory,
which MPI uses directly.  Those of a device are used by kernels, by copies and by MPI.  No stream is
waited for: an event marks the end of the last use before, and a message starts once it has passed.

    HostBuffer                 array ------------------------------- MPI
    DeviceBuffer   kernels --| array ------------------------------- MPI     | = an event
    StagedBuffer   kernels --| array --| copy --| pinned host ------ MPI

The callers: `Rotation.send` (`exchange`) copies the rank's own block into the current buffer and
calls `filled`.  `Rotation.pass_on` calls `sendable` of the current buffer and `receivable` of the
other, each of which returns when its request may start; `transfers` starts it then.
`Rotation.receive` calls `deliver` when a block has arrived, which is then the current one.

The host is ahead of the device: it queues the work of hop h as soon as block h has arrived, while
that of hop h-1 still runs.  With LV-XAttn and device buffers, a and b being the events after the
work of hops h-1 and h:

    computing   .. attention h-1, merge, copy of result h-1] a [attention h, merge, copy] b [..

    may start   send block h             at once: MPI has written it, and kernels only read it
                receive block h+1        at a: it overwrites block h-1, which attention h-1 reads
                send result h-1          at a: copying it is the last work before a
                receive another result   at once: it overwrites result h-2, which has been sent

Staged, two more streams copy, and a block that is passed on is sent from the host memory that it
was received in:

                copy result h-1 down     at a; it is sent when that is done
                copy block h up          after attention h-2, which reads what it overwrites;
                                         attention h waits for it
                receive block h+1        after block h-1, which it overwrites, has been copied up

Even a new buffer has an event to wait for: queued kernels may still use memory that the pool has
allocated again.
"""

import ctypes
from typing import Any, Protocol

import numpy as np

from .cuda_aware import cuda_aware
from .device import event, streams
from .transfers import Ready

Array = Any
_SUCCESS, _NOT_READY = 0, 600  # cudaEventQuery's


class Buffer(Protocol):
    """A fixed number of bytes on the device of the arrays, which MPI can send and receive.

    From `deliver` to the next `filled` or `receivable` it is *lent*: kernels that are not queued
    yet may read what MPI has written, so that there is no event yet after which all have.
    """

    array: Array

    def filled(self) -> None:
        """Mark that the kernels queued so far write `array`, and are the last to use it."""

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the first bytes for MPI to read, and whether all that writes them is done."""

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the first bytes for MPI to write, and whether all that reads them is done.

        No kernel queued later may use the block before.
        """

    def deliver(self, nbytes: int) -> None:
        """Make what MPI has written available in `array` to the kernels queued from now on."""

    def settle(self) -> None:
        """Wait for copies, so that the host memory can be reused."""


def buffer(xp: Any, nbytes: int, *, direct: bool = True) -> Buffer:
    """Return a buffer for blocks of `xp`'s arrays.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    nbytes : int
    direct : bool
        Whether to pass device memory to MPI if that supports it.

    Raises
    ------
    MemoryError
        With a note of the number of bytes; `computing` adds a note of the free memory.
    """
    try:
        if xp is np:
            return HostBuffer(nbytes)
        direct = direct and cuda_aware(xp)[0]
        return DeviceBuffer(xp, nbytes) if direct else StagedBuffer(xp, nbytes)
    except Exception as error:
        error.add_note(f"while allocating a buffer of {nbytes:,} bytes")
        raise


def _always() -> bool:
    return True


class HostBuffer:
    """Host memory, which MPI uses directly, and nothing asynchronously."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.empty(nbytes, np.uint8)

    def filled(self) -> None:
        """Do nothing: the array has been written."""

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes, which are always ready."""
        return self.array[:nbytes], _always

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes, which are always ready."""
        return self.array[:nbytes], _always

    def deliver(self, nbytes: int) -> None:
        """Do nothing: MPI wrote into the array."""

    def settle(self) -> None:
        """Do nothing: there are no copies."""


class DeviceBuffer:
    """Device memory, which a CUDA-aware MPI uses directly."""

    def __init__(self, xp: Any, nbytes: int) -> None:
        self.xp, self.array = xp, xp.empty(nbytes, xp.uint8)
        self.used = event(xp)
        self.lent = False

    def filled(self) -> None:
        """Mark the kernels that write the array, the last ones to use it."""
        self.used, self.lent = event(self.xp), False

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes, ready when kernels have written them, or at once if MPI has."""
        return self.array[:nbytes], _always if self.lent else passed(self.xp, self.used)

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes, ready when no kernel reads the block before."""
        if self.lent:
            self.filled()
        return self.array[:nbytes], passed(self.xp, self.used)

    def deliver(self, nbytes: int) -> None:  # noqa: ARG002
        """Lend the array to kernels: MPI wrote into it."""
        self.lent = True

    def settle(self) -> None:
        """Do nothing: there are no copies."""


class StagedBuffer(DeviceBuffer):
    """Device memory with a copy in pinned host memory, for an MPI that supports only that."""

    def __init__(self, xp: Any, nbytes: int) -> None:
        super().__init__(xp, nbytes)
        pinned = xp.cuda.alloc_pinned_memory(max(1, nbytes))
        self.host = np.frombuffer(pinned, np.uint8, nbytes)
        self._address = ctypes.c_void_p(self.host.ctypes.data)
        self.streams = streams(xp, self.array.device.id)
        self.copied = self.used

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the host's bytes, ready when they are copied, or at once if received there."""
        if self.lent:
            return self.host[:nbytes], _always
        with self.streams.to_host as stream:
            stream.wait_event(self.used)
            self.array.data.copy_to_host_async(self._address, nbytes, stream)
            self.copied = event(self.xp)
        return self.host[:nbytes], passed(self.xp, self.copied)

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the host's bytes, ready when no copy reads them."""
        if self.lent:
            self.filled()
        return self.host[:nbytes], passed(self.xp, self.copied)

    def deliver(self, nbytes: int) -> None:
        """Copy to the device, after the last kernel that reads what was there."""
        with self.streams.to_device as stream:
            stream.wait_event(self.used)
            self.array.data.copy_from_host_async(self._address, nbytes, stream)
            self.copied = event(self.xp)
        self.xp.cuda.get_current_stream().wait_event(self.copied)
        self.lent = True

    def settle(self) -> None:
        """Wait for the copy to the device."""
        self.copied.synchronize()


def passed(xp: Any, mark: Any) -> Ready:
    """Return a function that returns whether an event has passed.

    It raises the error of a kernel before the event, which would then never pass.
    """

    def ready() -> bool:
        status = xp.cuda.runtime.eventQuery(mark.ptr)
        if status not in (_SUCCESS, _NOT_READY):
            raise xp.cuda.runtime.CUDARuntimeError(status)
        return bool(status == _SUCCESS)

    return ready
