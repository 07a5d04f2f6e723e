"""Where arrays live, and how MPI gets at them.

NumPy arrays are handed to MPI as they are.  CuPy arrays live on a device whose kernels run behind
the program's back, and MPI knows nothing of them, so a buffer must be waited for before MPI may
touch it: before a send, for the kernel that writes it; before a receive, for the last that reads
it.  A CUDA-aware MPI then takes the device's memory; any other is given a copy in pinned host
memory.

    HostBuffer                 array -------------------------- MPI
    DeviceBuffer   kernels --| array -------------------------- MPI     |  = synchronised
    StagedBuffer   kernels --| array --copy--| pinned host ---- MPI
"""

import ctypes
import os
import re
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from lvxattn.reference.validation import library

Array = Any

# Whoever sets one of these has decided how many threads BLAS uses.
BLAS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
)


def array_module(x: Array) -> Any:
    """Return the module that computes with arrays such as `x`: numpy or cupy.

    Raises
    ------
    TypeError
        Its package is not NumPy and has no CUDA arrays as CuPy has.
    """
    module = import_module(library(x))
    if module is not np and not (hasattr(module, "cuda") and hasattr(module, "asnumpy")):
        raise TypeError(
            f"q: expected a NumPy or CuPy array, got {type(x).__name__} of {library(x)}"
        )
    return module


class Buffer(Protocol):
    """A fixed number of bytes beside the arrays, and the way to them for MPI."""

    array: Array

    def sendable(self, nbytes: int) -> Array:
        """Return what MPI may read: everything that writes the first `nbytes` is done."""

    def receivable(self, nbytes: int) -> Array:
        """Return what MPI may write: everything that reads the first `nbytes` is done."""

    def deliver(self, nbytes: int) -> None:
        """Make what MPI has written visible in `array`."""


def buffer(xp: Any, nbytes: int) -> Buffer:
    """Return a buffer for blocks of `xp`'s arrays."""
    if xp is np:
        return HostBuffer(nbytes)
    return DeviceBuffer(xp, nbytes) if cuda_aware()[0] else StagedBuffer(xp, nbytes)


class HostBuffer:
    """Host memory: MPI uses it directly, and nothing runs behind the program's back."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.empty(nbytes, np.uint8)

    def sendable(self, nbytes: int) -> Array:
        """Return the bytes themselves."""
        return self.array[:nbytes]

    def receivable(self, nbytes: int) -> Array:
        """Return the bytes themselves."""
        return self.array[:nbytes]

    def deliver(self, nbytes: int) -> None:
        """Do nothing: MPI wrote into the array."""


class DeviceBuffer:
    """Device memory that a CUDA-aware MPI uses directly."""

    def __init__(self, xp: Any, nbytes: int) -> None:
        self.xp = xp
        self.array = xp.empty(nbytes, xp.uint8)

    def sendable(self, nbytes: int) -> Array:
        """Wait for the kernels that write the buffer: MPI does not know of their stream."""
        _finish_kernels(self.xp)
        return self.array[:nbytes]

    def receivable(self, nbytes: int) -> Array:
        """Wait for the kernels that still read the block that the buffer held before."""
        _finish_kernels(self.xp)
        return self.array[:nbytes]

    def deliver(self, nbytes: int) -> None:
        """Do nothing: MPI wrote into the array."""


class StagedBuffer:
    """Device memory with a twin in pinned host memory, for an MPI that knows only the host."""

    def __init__(self, xp: Any, nbytes: int) -> None:
        self.xp = xp
        self.array = xp.empty(nbytes, xp.uint8)
        pinned = xp.cuda.alloc_pinned_memory(max(1, nbytes))
        self.host = np.frombuffer(pinned, np.uint8, nbytes)

    def sendable(self, nbytes: int) -> Array:
        """Copy to the host; the copy runs after the kernels that write the buffer."""
        self.array[:nbytes].get(out=self.host[:nbytes])
        _finish_kernels(self.xp)  # the copy may be asynchronous: MPI must not read before its end
        return self.host[:nbytes]

    def receivable(self, nbytes: int) -> Array:
        """Wait for a copy to the device that may still read the host's bytes."""
        _finish_kernels(self.xp)
        return self.host[:nbytes]

    def deliver(self, nbytes: int) -> None:
        """Copy to the device; kernels that read the block run after the copy."""
        self.array[:nbytes].set(self.host[:nbytes])


def cuda_aware() -> tuple[bool, str]:
    """Tell whether MPI may be handed device memory, and how that was decided.

    Not collective.  ``LVXATTN_CUDA_AWARE`` = 0 or 1 decides; unset or ``auto`` asks the library.
    A library that says yes and is wrong ends the program with a segmentation fault; 0 is the way
    out.

    Returns
    -------
    aware : bool
    why : str

    Raises
    ------
    ValueError
        The variable has another value.
    """
    wish = os.environ.get("LVXATTN_CUDA_AWARE", "auto")
    if wish not in ("auto", "0", "1"):
        raise ValueError(f"LVXATTN_CUDA_AWARE: expected auto, 0 or 1, got {wish!r}")
    if wish != "auto":
        return wish == "1", f"LVXATTN_CUDA_AWARE={wish}"
    loaded = ctypes.CDLL(_libmpi())
    if hasattr(loaded, "MPIX_Query_cuda_support"):  # Open MPI, MVAPICH, ParaStation
        return bool(loaded.MPIX_Query_cuda_support()), "MPIX_Query_cuda_support"
    if hasattr(loaded, "MPIX_GPU_query_support"):  # MPICH: 0 is CUDA
        flag = ctypes.c_int(0)
        failed = loaded.MPIX_GPU_query_support(0, ctypes.byref(flag))
        return not failed and bool(flag.value), "MPIX_GPU_query_support"
    info = MPI.COMM_WORLD.Get_info()
    kinds = (info.get("mpi_memory_alloc_kinds") or "").split(",")
    info.Free()
    # A kind may have restrictors, as cuda:device has.
    return any(kind.partition(":")[0] == "cuda" for kind in kinds), "mpi_memory_alloc_kinds"


def limit_blas_threads(comm: MPI.Intracomm) -> int:
    """Give each rank its share of its host's cores, unless one of `BLAS_VARIABLES` is set.

    Collective: every rank of comm calls this.  Ranks that each start as many threads as the host
    has cores fight for them.

    Parameters
    ----------
    comm : MPI.Intracomm

    Returns
    -------
    int
        How many threads BLAS uses on this rank from now on.
    """
    from threadpoolctl import threadpool_info, threadpool_limits

    on_host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    # A launcher may have bound ranks to cores of their own, or let all of them have all.
    cores = frozenset[int]().union(*on_host.allgather(os.sched_getaffinity(0)))
    ranks = on_host.size
    on_host.Free()
    if not any(os.environ.get(name) for name in BLAS_VARIABLES):
        threadpool_limits(max(1, len(cores) // ranks), user_api="blas")
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max((pool["num_threads"] for pool in pools), default=1)


def _finish_kernels(xp: Any) -> None:
    xp.cuda.get_current_stream().synchronize()


def _libmpi() -> str | None:
    """Return the path of the MPI library that this process has loaded."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if re.match(r"libmpi(_(cray|gnu|intel|nvidia|amd)\w*)?\.so", os.path.basename(path)):
                return "/" + path
    return None
