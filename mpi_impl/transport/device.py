"""The devices that ranks compute on: the host, or a GPU with streams of its own.

A GPU works asynchronously: each stream in order, and two streams in an order only where an event
gives one.  Attention is queued on a stream that waits for events only.  The default stream would
not do: an MPI library may copy on it, and its copies would then wait for the queued attention.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from lvxattn.common.validation import is_array, library

Array = Any

# If one of these is set, the user has chosen the number of threads of BLAS.
BLAS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
)

# CuPy's pool raises a MemoryError; the runtime, the driver and cuBLAS use these words.
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "ALLOC_FAILED"


def array_module(x: Array) -> Any:
    """Return the module of the array `x`: numpy or cupy.

    Raises
    ------
    TypeError
        The module is not NumPy, and lacks the CUDA functions of CuPy.
    """
    module = import_module(library(x)) if library(x) in sys.modules else None
    if module is not np and not (hasattr(module, "cuda") and hasattr(module, "asnumpy")):
        raise TypeError(
            f"q: expected a NumPy or CuPy array, got {type(x).__name__} of {library(x)}"
        )
    return module


def check_arrays(q: Any) -> None:
    """Check that q, if an array, is NumPy's or CuPy's."""
    if is_array(q):
        array_module(q)


class Streams(NamedTuple):
    """The streams of a device: for kernels and for copies in either direction, which overlap."""

    computing: Any
    to_host: Any
    to_device: Any


@cache
def streams(xp: Any, device: int) -> Streams:
    """Return the streams of one device.

    They are cached, as CuPy has a memory pool for each stream: memory of a deleted stream would not
    be reused.

    Parameters
    ----------
    xp : module
        cupy.
    device : int
    """
    with xp.cuda.Device(device):
        return Streams(*(xp.cuda.Stream(non_blocking=True) for _ in Streams._fields))


def event(xp: Any) -> Any:
    """Return an event that passes when all work queued so far on the current stream is done."""
    made = xp.cuda.Event(disable_timing=True)
    made.record(xp.cuda.get_current_stream())
    return made


@contextmanager
def computing(x: Array) -> Iterator[None]:
    """Compute on the device of `x`, if it has one, on a stream of our own.

    It runs after all work that the caller has queued on the current stream, and before all that the
    caller queues there later; the host waits for neither.

    Memory returns to the pool of the stream that it was allocated on.  The memory of results is
    reused by the next call, after all work queued on the stream that is current then.  A caller who
    uses results on another stream must make the current one wait for it.

    Parameters
    ----------
    x : array
    """
    xp = array_module(x)
    if xp is np:
        yield
        return
    with x.device, _free_memory_noted(xp):
        callers, own = xp.cuda.get_current_stream(), streams(xp, x.device.id).computing
        own.wait_event(event(xp))
        with own:
            try:
                yield
            finally:
                callers.wait_event(event(xp))


@contextmanager
def _free_memory_noted(xp: Any) -> Iterator[None]:
    """Add a note of the free memory to an out-of-memory error."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
            device = xp.cuda.Device()
            free, total = device.mem_info
            error.add_note(f"device {device.id} has {free:,} of {total:,} bytes free")
        raise


def use_device(comm: MPI.Intracomm, xp: Any) -> int:
    """Assign devices to the ranks of a host in turn, and make this rank's the current one.

    Collective: every rank of comm calls this.  Where a launcher shows each rank one device, it is
    that one; where there are more ranks than devices, ranks share them.

    Parameters
    ----------
    comm : MPI.Intracomm
    xp : module
        cupy.

    Returns
    -------
    int
        The number of the device among those that this rank sees.

    Examples
    --------
    >>> import cupy  # doctest: +SKIP
    >>> from mpi4py import MPI
    >>> from lvxattn.mpi_impl import use_device
    >>> use_device(MPI.COMM_WORLD, cupy)  # doctest: +SKIP
    0
    """
    device = rank_on_host(comm) % int(xp.cuda.runtime.getDeviceCount())
    xp.cuda.Device(device).use()
    return device


def obstacle(xp: Any) -> str | None:
    """Return why CuPy cannot compute on the current device, or None.  Not collective.

    CuPy compiles its kernels at first use, which requires more than its package.

    Parameters
    ----------
    xp : module
        cupy.
    """
    try:
        xp.asnumpy(xp.ones(1, "float32") + 1)
    except Exception as error:  # the compiler's, the driver's, the runtime's
        needs = "it needs a driver, and NVRTC and headers, which the extra cuda12 or cuda13 brings"
        return f"CuPy cannot compute ({in_a_line(error)}); {needs}"
    return None


def in_a_line(error: Exception) -> str:
    """Return the type and the first line of an error, as a compiler's log is long."""
    lines = [*filter(None, map(str.strip, str(error).splitlines())), ""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def rank_on_host(comm: MPI.Intracomm) -> int:
    """Return the number of this rank among those of its host.

    Collective: every rank of comm calls this.
    """
    on_host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    number: int = on_host.rank
    on_host.Free()
    return number


def limit_blas_threads(comm: MPI.Intracomm) -> int:
    """Limit the threads of BLAS to this rank's share of the host's cores.

    Collective: every rank of comm calls this.  Without a limit each rank would start as many
    threads as the host has cores.  If one of `BLAS_VARIABLES` is set, nothing is changed.

    Parameters
    ----------
    comm : MPI.Intracomm

    Returns
    -------
    int
        The number of threads that BLAS uses on this rank from now on.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from lvxattn.mpi_impl import limit_blas_threads
    >>> limit_blas_threads(MPI.COMM_WORLD)  # doctest: +SKIP
    8
    """
    from threadpoolctl import threadpool_info, threadpool_limits

    on_host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    # A launcher may have bound each rank to its own cores, or all ranks to all.
    cores = frozenset[int]().union(*on_host.allgather(os.sched_getaffinity(0)))
    ranks = on_host.size
    on_host.Free()
    if not any(os.environ.get(name) for name in BLAS_VARIABLES):
        threadpool_limits(max(1, len(cores) // ranks), user_api="blas")
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max((pool["num_threads"] for pool in pools), default=1)
