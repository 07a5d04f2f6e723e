"""Where a rank computes: on the host, or on a device with streams of its own.

NumPy works when it is called.  A device works behind the program's back, each of its streams in
order and no two of them, unless an event orders them.  A pass computes on a stream that waits for
nothing but events: not for the default stream, whose turn the copies of an MPI library may have to
wait for, and through which they would wait for the attention that is queued there.
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

# Whoever sets one of these has decided how many threads BLAS uses.
BLAS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
)

# CuPy's pool raises a MemoryError; these are the runtime's, the driver's and cuBLAS's words.
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "ALLOC_FAILED"


def array_module(x: Array) -> Any:
    """Return the module that computes with arrays such as `x`: numpy or cupy.

    Raises
    ------
    TypeError
        Its package is not NumPy and has no CUDA arrays as CuPy has.
    """
    module = import_module(library(x)) if library(x) in sys.modules else None
    if module is not np and not (hasattr(module, "cuda") and hasattr(module, "asnumpy")):
        raise TypeError(
            f"q: expected a NumPy or CuPy array, got {type(x).__name__} of {library(x)}"
        )
    return module


def check_arrays(q: Any) -> None:
    """Refuse the arrays of other libraries; what is no array is left to the shared checks."""
    if is_array(q):
        array_module(q)


class Streams(NamedTuple):
    """A device's streams: for kernels, and for copies either way, which overlap one another."""

    computing: Any
    to_host: Any
    to_device: Any


@cache
def streams(xp: Any, device: int) -> Streams:
    """Return the streams of one device.

    They are kept, because CuPy keeps the memory of each stream apart, and that of a stream that is
    gone is lost to the next.

    Parameters
    ----------
    xp : module
        cupy.
    device : int
    """
    with xp.cuda.Device(device):
        return Streams(*(xp.cuda.Stream(non_blocking=True) for _ in Streams._fields))


def event(xp: Any) -> Any:
    """Return an event at which everything queued so far on the current stream is done."""
    made = xp.cuda.Event(disable_timing=True)
    made.record(xp.cuda.get_current_stream())
    return made


@contextmanager
def computing(x: Array) -> Iterator[None]:
    """Compute where `x` is and, on a device, on its own stream.

    What the caller has queued on the current stream comes before, and what the caller queues there
    afterwards comes after; the host waits for neither.

    Memory goes back to the stream that it was made on.  That of results is taken again by the next
    pass, which comes after what was queued on the stream that is current then: a caller who uses
    results on yet another stream lets that one wait for it.

    Parameters
    ----------
    x : array
    """
    xp = array_module(x)
    if xp is np:
        yield
        return
    with x.device, _memory_told(xp):
        callers, own = xp.cuda.get_current_stream(), streams(xp, x.device.id).computing
        own.wait_event(event(xp))
        with own:
            try:
                yield
            finally:
                callers.wait_event(event(xp))


@contextmanager
def _memory_told(xp: Any) -> Iterator[None]:
    """Add a note of how much memory is free to an error that says that it has run out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
            device = xp.cuda.Device()
            free, total = device.mem_info
            error.add_note(f"device {device.id} has {free:,} of {total:,} bytes free")
        raise


def use_device(comm: MPI.Intracomm, xp: Any) -> int:
    """Make this rank's device the current one: the ranks of a host take its devices in turn.

    Collective: every rank of comm calls this.  Where a launcher shows each rank one device only,
    that is it; where there are more ranks than devices, they share them.

    Parameters
    ----------
    comm : MPI.Intracomm
    xp : module
        cupy.

    Returns
    -------
    int
        The device's number among those that this rank sees.
    """
    device = rank_on_host(comm) % int(xp.cuda.runtime.getDeviceCount())
    xp.cuda.Device(device).use()
    return device


def obstacle(xp: Any) -> str | None:
    """Say what keeps CuPy from computing on the current device, or None.  Not collective.

    CuPy compiles its own kernels, too, when they are first used.  What that takes, its package
    alone does not bring.

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
    """Return an error's kind and the first line of what it says: a compiler's log is long."""
    lines = [*filter(None, map(str.strip, str(error).splitlines())), ""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def rank_on_host(comm: MPI.Intracomm) -> int:
    """Return this rank's number among those of its host.

    Collective: every rank of comm calls this.
    """
    on_host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    number: int = on_host.rank
    on_host.Free()
    return number


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
