"""What a rank knows of itself: host, cores, libraries, devices."""

import os
import platform
import socket
from dataclasses import dataclass
from glob import glob
from importlib import import_module

import numpy as np
from mpi4py import MPI

from lvxattn.mpi_impl.kernels import choose
from lvxattn.mpi_impl.transport.cuda_aware import cuda_aware, library_says
from lvxattn.mpi_impl.transport.device import BLAS_VARIABLES
from lvxattn.mpi_impl.transport.device import obstacle as obstacle_of


@dataclass(frozen=True)
class RankInfo:
    """One rank.

    Attributes
    ----------
    host : str
    cores : frozenset of int
        Those that this process may run on.
    library : str
        MPI library and version.
    versions : str
        Of Python and NumPy.
    blas : str
        Its name and version; empty if unknown.
    threads : int
        BLAS threads.
    threads_from : str
        Who has set their number.
    cupy : str
        Its version; empty if it is not there.
    devices : tuple of str
        GPUs that CuPy sees, or none.
    gpu_files : int
        GPUs that the operating system shows.
    cuda_aware : tuple of bool and str
        Whether MPI takes device memory, and how that was decided.
    denied : str
        How the library was asked that denies it, where it is decided otherwise; else empty.
    kernel : str
        What attends to blocks on this rank's GPU, and why; empty without one.
    obstacle : str
        What keeps this rank from computing there; else empty.
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


def look(threads: int, number: int = 0) -> RankInfo:
    """Return this rank's facts.  Not collective.

    Parameters
    ----------
    threads : int
        As `limit_blas_threads` returned it.
    number : int
        This rank's on its host: it says which device is its own.
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
    )


def _library() -> str:
    """Return the first line of what the library says of itself, and the standard's version."""
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
    """Return what attends to blocks on a device, and what keeps it from computing at all."""
    cupy = import_module("cupy")
    with cupy.cuda.Device(device):
        found = obstacle_of(cupy)
        if found:
            return "", found
        x = cupy.zeros((1, 1, 1, 64), "float16")
        try:
            return str(choose(x, x, x, None)), ""
        except (RuntimeError, ValueError) as error:  # LVXATTN_KERNEL=cuda, where it cannot be
            return "", str(error)
