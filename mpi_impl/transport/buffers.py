r"""Buffers between a device that works late and an MPI that knows nothing of it.

Blocks lie in two buffers, one in hand and one to receive into.  NumPy's are host memory, which MPI
uses as it is.  Those of a device are used by kernels, by copies and by MPI, and nothing waits for a
stream: events say when the last use before is over, and a message starts once they have passed.

    HostBuffer                 array ------------------------------- MPI
    DeviceBuffer   kernels --| array ------------------------------- MPI     | = an event
    StagedBuffer   kernels --| array --| copy --| pinned host ------ MPI

Who calls what: a rotation (`exchange`), in `shift`, copies the rank's own block into the buffer in
hand and says `filled`, or leaves there what came; asks when that may be sent (`sendable`) and when
the other may be received into (`receivable`); and makes each request to MPI when its answer has
become yes (`transfers`).  In `wait` it says `deliver` when a block has come: that is in hand now.

The host is ahead of the device: it queues the work of hop h as soon as block h is there, while that
of hop h-1 still runs.  With LV-XAttn and device buffers, a and b being the events after the work of
hops h-1 and h:

    computing   .. attention h-1, merge, copy of result h-1] a [attention h, merge, copy] b [..

    may begin   send block h             at once: MPI has written it, and kernels only read it
                receive block h+1        at a: where block h-1 lies, which attention h-1 reads
                send result h-1          at a: copying it is the last work before a
                receive another result   at once: where result h-2 lies, which has been sent

Staged, two more streams copy, and a block that is sent on is sent from the host, where it came in:

                copy result h-1 down     at a; it is sent when that is done
                copy block h up          when attention h-2 has read what lies there; attention h
                                         waits for it
                receive block h+1        when block h-1, which lies there, has been copied up

A buffer's memory is used late from its first moment: kernels that are still queued may use what the
pool gives out again.  So a new buffer, too, has an event to wait for.
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
    """A fixed number of bytes beside the arrays, and the way to them for MPI.

    From `deliver` to the next `filled` or `receivable` it is *lent*: kernels that are yet to be
    queued may read what MPI has written, so that no event can say yet when all have.
    """

    array: Array

    def filled(self) -> None:
        """Say that `array` has been written by kernels queued so far, the last ones to use it."""

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return what MPI may read, and when: everything that writes the first bytes is done."""

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return what MPI may write, and when: everything that reads the bytes is done.

        Says, too, that no kernel queued later uses the block that was there.
        """

    def deliver(self, nbytes: int) -> None:
        """Show kernels that follow what MPI has written, in `array`: lend it to them."""

    def settle(self) -> None:
        """Wait for copies, so that the host's memory may be used otherwise."""


def buffer(xp: Any, nbytes: int, *, direct: bool = True) -> Buffer:
    """Return a buffer for blocks of `xp`'s arrays.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    nbytes : int
    direct : bool
        Whether MPI may be given device memory, if it takes that.

    Raises
    ------
    MemoryError
        Noting how many bytes were asked for; `computing` adds how many a device has free.
    """
    try:
        if xp is np:
            return HostBuffer(nbytes)
        direct = direct and cuda_aware(xp)[0]
        return DeviceBuffer(xp, nbytes) if direct else StagedBuffer(xp, nbytes)
    except Exception as error:
        error.add_note(f"a buffer of {nbytes:,} bytes was asked for")
        raise


def _always() -> bool:
    return True


class HostBuffer:
    """Host memory: MPI uses it directly, and nothing runs behind the program's back."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.empty(nbytes, np.uint8)

    def filled(self) -> None:
        """Do nothing: it is written."""

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes themselves, at any time."""
        return self.array[:nbytes], _always

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes themselves, at any time."""
        return self.array[:nbytes], _always

    def deliver(self, nbytes: int) -> None:
        """Do nothing: MPI wrote into the array."""

    def settle(self) -> None:
        """Do nothing: there are no copies."""


class DeviceBuffer:
    """Device memory that a CUDA-aware MPI uses directly."""

    def __init__(self, xp: Any, nbytes: int) -> None:
        self.xp, self.array = xp, xp.empty(nbytes, xp.uint8)
        self.used = event(xp)
        self.lent = False

    def filled(self) -> None:
        """Mark the kernels that write the array, the last ones to use it."""
        self.used, self.lent = event(self.xp), False

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes: when they are written, or at once where MPI has written them."""
        return self.array[:nbytes], _always if self.lent else passed(self.xp, self.used)

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the bytes, when no kernel reads the block that they held before."""
        if self.lent:
            self.filled()
        return self.array[:nbytes], passed(self.xp, self.used)

    def deliver(self, nbytes: int) -> None:  # noqa: ARG002
        """Lend the array to kernels: MPI wrote into it."""
        self.lent = True

    def settle(self) -> None:
        """Do nothing: there are no copies."""


class StagedBuffer:
    """Device memory with a twin in pinned host memory, for an MPI that knows only the host."""

    def __init__(self, xp: Any, nbytes: int) -> None:
        self.xp, self.array = xp, xp.empty(nbytes, xp.uint8)
        pinned = xp.cuda.alloc_pinned_memory(max(1, nbytes))
        self.host = np.frombuffer(pinned, np.uint8, nbytes)
        self._address = ctypes.c_void_p(self.host.ctypes.data)
        self.streams = streams(xp, self.array.device.id)
        self.used = self.copied = event(xp)
        self.lent = False

    def filled(self) -> None:
        """Mark the kernels that write the array, the last ones to use it."""
        self.used, self.lent = event(self.xp), False

    def sendable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the host's bytes: when they are copied, or at once where they came in there."""
        if self.lent:
            return self.host[:nbytes], _always
        with self.streams.to_host as stream:
            stream.wait_event(self.used)
            self.array.data.copy_to_host_async(self._address, nbytes, stream)
            self.copied = event(self.xp)
        return self.host[:nbytes], passed(self.xp, self.copied)

    def receivable(self, nbytes: int) -> tuple[Array, Ready]:
        """Return the host's bytes, when no copy reads them."""
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
    """Return what asks whether an event has passed.

    It raises what a kernel before the event has failed with: such an event never passes.
    """

    def ready() -> bool:
        status = xp.cuda.runtime.eventQuery(mark.ptr)
        if status not in (_SUCCESS, _NOT_READY):
            raise xp.cuda.runtime.CUDARuntimeError(status)
        return bool(status == _SUCCESS)

    return ready
