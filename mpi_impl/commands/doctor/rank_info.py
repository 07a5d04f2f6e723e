"""The facts that a diagnosis rests on: each rank's environment, and messages really sent."""

import os
import platform
import socket
from dataclasses import dataclass
from functools import partial
from glob import glob
from importlib import import_module
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.common.shared_memory import unmapped_files
from lvxattn.mpi_impl.kernels import choose
from lvxattn.mpi_impl.transport.buffers import buffer
from lvxattn.mpi_impl.transport.cuda_aware import cuda_aware, library_says
from lvxattn.mpi_impl.transport.device import BLAS_VARIABLES
from lvxattn.mpi_impl.transport.device import obstacle as obstacle_of
from lvxattn.mpi_impl.transport.transfers import Transfer, Transfers
from lvxattn.mpi_impl.transport.watchdog import wait

_SMALL, _LARGE = 1, 2**22
_STEPS, _LARGE_STEPS = 100, 5


@dataclass(frozen=True)
class RankInfo:
    """One rank's environment.

    Attributes
    ----------
    host : str
    cores : frozenset of int
        The cores that this process may run on.
    library : str
        Name and version of the MPI library.
    versions : str
        Versions of Python and NumPy.
    blas : str
        Name and version of the BLAS; empty if unknown.
    threads : int
        BLAS threads.
    threads_from : str
        What set their number.
    cupy : str
        CuPy's version; empty if not installed.
    devices : tuple of str
        The GPUs that CuPy sees.
    gpu_files : int
        Number of GPUs that the operating system shows.
    cuda_aware : tuple of bool and str
        Whether device memory is passed to MPI, and how that was decided.
    denied : str
        The query by which the library denies it, if it was decided otherwise; else empty.
    kernel : str
        The kernel for blocks on this rank's GPU, and why; empty without one.
    obstacle : str
        Why this rank cannot compute on its GPU; empty if it can.
    forgotten : tuple of str
        Files of ended MPI jobs in this host's shared memory; on the first rank of a host.
    """

    host: str
    cores: frozenset[int]
    library: str
    versions: str
    blas: str
    threads: int
    threads_from: str
    cupy: str
    devices: tuple[str, ...]
    gpu_files: int
    cuda_aware: tuple[bool, str]
    denied: str = ""
    kernel: str = ""
    obstacle: str = ""
    forgotten: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """What a rank received from the rank before it.

    Attributes
    ----------
    source, rank : int
    whole : bool
        Whether every byte arrived as sent.
    latency : float
        Seconds for a message of one byte.
    bandwidth : float
        Bytes per second for messages of 4 MiB.
    """

    source: int
    rank: int
    whole: bool
    latency: float
    bandwidth: float


def look(threads: int, number: int = 0) -> RankInfo:
    """Return this rank's environment.  Not collective.

    Parameters
    ----------
    threads : int
        As `limit_blas_threads` returns it.
    number : int
        Number of this rank on its host, which selects its device.
    """
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    setters = [name for name in BLAS_VARIABLES if os.environ.get(name)]
    cupy, devices = _devices()
    device = number % max(1, len(devices))
    try:
        aware, (says, how) = cuda_aware(device=device), library_says()
    except OSError as error:
        aware, says, how = (False, str(error)), False, ""
    kernel, obstacle = _attention(device) if devices else ("", "")
    return RankInfo(
        host=socket.gethostname(),
        cores=frozenset(os.sched_getaffinity(0)),
        library=_library(),
        versions=f"Python {platform.python_version()}, NumPy {np.__version__}",
        blas=" ".join(f"{pool['internal_api']} {pool['version']}" for pool in pools[:1]),
        threads=threads,
        threads_from=setters[0] if setters else "cores divided by ranks",
        cupy=cupy,
        devices=devices,
        gpu_files=len(glob("/dev/nvidia[0-9]*")),
        cuda_aware=aware,
        denied=how if aware[0] and not says else "",
        kernel=kernel,
        obstacle=obstacle,
        forgotten=tuple(map(str, unmapped_files())) if number == 0 else (),
    )


def _library() -> str:
    """Return the first line of the library's version text, and the standard's version."""
    first = " ".join(MPI.Get_library_version().rstrip("\0").splitlines()[0].split())
    standard = ".".join(map(str, MPI.Get_version()))
    return f"{first.split(', package')[0]}, MPI {standard}"


def _devices() -> tuple[str, tuple[str, ...]]:
    try:
        cupy = import_module("cupy")
    except ImportError:
        return "", ()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        properties = (cupy.cuda.runtime.getDeviceProperties(n) for n in range(count))
        return str(cupy.__version__), tuple(device["name"].decode() for device in properties)
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver, no device
        return str(cupy.__version__), ()


def _attention(device: int) -> tuple[str, str]:
    """Return the kernel for blocks on a device, and why the device cannot compute; one is empty."""
    cupy = import_module("cupy")
    with cupy.cuda.Device(device):
        found = obstacle_of(cupy)
        if found:
            return "", found
        x = cupy.zeros((1, 1, 1, 64), "float16")
        try:
            return str(choose(x, x, x, None)), ""
        except (RuntimeError, ValueError) as error:  # LVXATTN_KERNEL=cuda without support
            return "", str(error)


def send_round(comm: MPI.Intracomm) -> Link:
    """Send small and large messages around the ring.

    Collective: every rank of comm calls this.
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    whole, best = True, {}
    for size, steps, rounds in ((_SMALL, _STEPS, 3), (_LARGE, 1, _LARGE_STEPS)):
        sent, received = np.full(size, comm.rank % 251, np.uint8), np.full(size, 255, np.uint8)
        comm.Sendrecv(
            sent, right, recvbuf=received, source=left
        )  # the first message makes the connection
        whole = whole and bool((received == left % 251).all())
        times = []
        for _ in range(rounds):
            start = perf_counter()
            for _ in range(steps):
                comm.Sendrecv(sent, right, recvbuf=received, source=left)
            times.append((perf_counter() - start) / steps)
        best[size] = min(times)
    return Link(left, comm.rank, whole, best[_SMALL], _LARGE / best[_LARGE])


def send_from_device(comm: MPI.Intracomm, xp: Any) -> bool:
    """Send a small and a large block around the ring as a pass does; return whether all arrived.

    Collective: every rank of comm calls this.  Unlike the self-test, which is one process, this
    covers the transport between processes and hosts.

    Parameters
    ----------
    comm : MPI.Intracomm
    xp : module
        cupy; blocks are on the current device.
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    whole = True
    for size in (_SMALL, _LARGE):
        there, here = buffer(xp, size), buffer(xp, size)
        there.array[...] = comm.rank % 251
        there.filled()
        (block, written), (room, empty) = there.sendable(size), here.receivable(size)
        coming = Transfer(partial(comm.Irecv, [room, MPI.BYTE], left), empty)
        going = Transfer(partial(comm.Isend, [block, MPI.BYTE], right), written)
        wait(Transfers([coming, going]), None, lambda: "a block of device memory")
        here.deliver(size)
        whole = whole and bool((xp.asnumpy(here.array) == left % 251).all())
    return whole
