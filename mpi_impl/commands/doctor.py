"""What ``lvxattn.mpi_impl doctor`` knows of MPI and CuPy; the rest is `lvxattn.cli.doctor`.

Little is known before a first message has come from another host, and MPI waits for it for ever.
So that wait, and that for MPI to start, are limited, and name what selects MPI's network.
"""

import os
from contextlib import nullcontext
from functools import partial
from glob import glob
from importlib import import_module
from time import perf_counter
from typing import Any

import mpi4py
import numpy as np
from mpi4py import MPI

from lvxattn.cli.doctor import RankInfo, examine, look_around
from lvxattn.cli.doctor.rank_info import first_variable
from lvxattn.common.launcher import mismatch, speaks
from lvxattn.mpi_impl.commands.run import MPIRanks
from lvxattn.mpi_impl.kernels import choose
from lvxattn.mpi_impl.transport.buffers import buffer
from lvxattn.mpi_impl.transport.cuda_aware import SELF_TEST_SECONDS, cuda_aware, library_says
from lvxattn.mpi_impl.transport.device import (
    BLAS_VARIABLES,
    limit_blas_threads,
    obstacle,
    rank_on_host,
    use_device,
)
from lvxattn.mpi_impl.transport.start import INTERFACES, PATIENCE, network_hint
from lvxattn.mpi_impl.transport.transfers import Transfer, Transfers
from lvxattn.mpi_impl.transport.watchdog import wait, watching

_TAG = 7006
_BLOCKS = 1, 2**22  # bytes


class DoctorRanks(MPIRanks):
    """The ranks of a communicator as `lvxattn.cli.doctor.DoctorRanks`.

    Attributes
    ----------
    speaks : bool
    start : str
    """

    start = "mpiexec -n 4"

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm, PATIENCE)
        self.speaks = speaks(os.environ, comm.rank)
        self.left, self.right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size

    def mismatch(self) -> str | None:
        """Return an error message if the launcher is that of another MPI."""
        return mismatch(os.environ, MPI.COMM_WORLD.size)

    def exchange(self, sent: Any, received: Any) -> float:
        """Send bytes to the next rank, receive from the one before; return the seconds till then.

        Collective: every rank calls this.
        """
        start, null = perf_counter(), MPI.REQUEST_NULL
        coming = null if received is None else self.comm.Irecv(received, self.left, _TAG)
        going = null if sent is None else self.comm.Isend(sent, self.right, _TAG)
        coming.Wait()
        seconds = perf_counter() - start
        going.Wait()
        return seconds

    def meet(self, *, limited: bool) -> None:
        """Wait for a first message.  Collective: every rank calls this before any other message.

        Parameters
        ----------
        limited : bool
            False if ``LVXATTN_TIMEOUT`` is no number.
        """
        if self.size == 1:
            return
        byte, room = np.zeros(1, np.uint8), np.empty(1, np.uint8)
        awaited = f"a first message from rank {self.left}. {network_hint()}"
        with self.watching(awaited) if limited else nullcontext():
            self.exchange(byte, room)

    def look(self) -> RankInfo:
        """Return what this rank tells.  Collective: every rank calls this."""
        with watching(self.comm, "all ranks' environments", PATIENCE + SELF_TEST_SECONDS):
            threads, number = limit_blas_threads(self.comm), rank_on_host(self.comm)
        return look(threads, number)

    def allgather(self, sendobj: Any) -> list[Any]:
        """Return the objects of all ranks.  Collective: every rank calls this."""
        # One of them may be at its self-test.
        with watching(self.comm, "all ranks' objects", PATIENCE + SELF_TEST_SECONDS):
            return self.comm.allgather(sendobj)

    def send_from_device(self) -> bool:
        """Send device memory around the ring.  Collective: every rank calls this."""
        xp = import_module("cupy")
        use_device(self.comm, xp)
        with self.watching("device memory around the ring"):
            return _send_from_device(self.comm, xp)


def run_doctor(comm: MPI.Intracomm) -> int:
    """Examine the ranks; return the exit status.  Collective: every rank of comm calls this."""
    return 0 if examine(DoctorRanks(comm)) else 1


def look(threads: int, number: int = 0) -> RankInfo:
    """Return what this rank tells.  Not collective.

    Parameters
    ----------
    threads : int
        As `limit_blas_threads` returns it.
    number : int
        Number of this rank on its host, which selects its device.
    """
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    blas = " ".join(f"{pool['internal_api']} {pool['version']}" for pool in pools[:1])
    setters = [name for name in BLAS_VARIABLES if os.environ.get(name)]
    versions, devices = _cupy()
    device = number % max(1, len(devices))
    try:
        aware, (says, how) = cuda_aware(device=device), library_says()
    except OSError as error:
        aware, says, how = (False, str(error)), False, ""
    kernel, problem = _attention(device) if devices else ("", "")
    cupy = versions.get("CuPy", "")
    return RankInfo(
        **vars(look_around(number)),
        transport=("MPI", _library()),
        versions={"mpi4py": mpi4py.__version__, **versions},
        arrays=f"NumPy with {blas or 'an unknown BLAS'}",
        gpus=f"CuPy {cupy}: {', '.join(devices) or 'no GPU'}" if cupy else "CuPy is not installed",
        devices=devices,
        threads=threads,
        threads_name="BLAS threads",
        threads_from=setters[0] if setters else "cores divided by ranks",
        interface_from=first_variable(INTERFACES),
        details={
            "kernel": kernel,
            "CUDA-aware": f"{'yes' if aware[0] else 'no'}, by {aware[1]}",
        },
        remarks=tuple(
            remarks(blas, cupy, devices, aware, denied=how if aware[0] and not says else "")
        ),
        obstacle=problem,
    )


def remarks(
    blas: str, cupy: str, devices: tuple[str, ...], aware: tuple[bool, str], denied: str
) -> list[str]:
    """Return advice on the libraries of a rank.

    Parameters
    ----------
    blas, cupy : str
        Names and versions; empty if unknown, or not installed.
    devices : tuple of str
    aware : tuple of bool and str
        Whether device memory is passed to MPI, and how that was decided.
    denied : str
        The query by which the library denies it, if it was decided otherwise; else empty.
    """
    found = []
    if not blas:
        found.append(
            "threadpoolctl does not know NumPy's BLAS: set OMP_NUM_THREADS to a rank's share of "
            "the cores yourself"
        )
    if glob("/dev/nvidia[0-9]*") and not cupy:
        found.append("there are GPUs, but no CuPy: the extra cuda12 or cuda13 installs it")
    elif cupy and not devices:
        found.append("CuPy finds no GPU: check the driver and CUDA_VISIBLE_DEVICES")
    if devices and not aware[0]:
        advice = (
            "find out what the library lacks, or set LVXATTN_CUDA_AWARE=1 to override"
            if "self-test" in aware[1]
            else "a CUDA-aware MPI avoids the copies"
        )
        found.append(
            f"MPI does not take device memory ({aware[1]}): messages go through pinned host "
            f"memory; {advice}"
        )
    if denied:
        found.append(
            f"LVXATTN_CUDA_AWARE=1 contradicts the library ({denied}): if the library is right, "
            "passes over CuPy arrays crash or receive wrong bytes"
        )
    return found


def _library() -> str:
    """Return the first line of the library's version text, and the standard's version."""
    first = " ".join(MPI.Get_library_version().rstrip("\0").splitlines()[0].split())
    standard = ".".join(map(str, MPI.Get_version()))
    return f"{first.split(', package')[0]}, MPI {standard}"


def _cupy() -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the versions of CuPy, of CUDA and of what the driver supports, and the GPUs."""
    try:
        cupy = import_module("cupy")
    except ImportError:
        return {}, ()
    runtime, versions = cupy.cuda.runtime, {"CuPy": str(cupy.__version__)}
    try:
        for name, ask in (("CUDA", "runtimeGetVersion"), ("CUDA's driver", "driverGetVersion")):
            number = getattr(runtime, ask)()
            versions[name] = f"{number // 1000}.{number % 1000 // 10}"
        properties = map(runtime.getDeviceProperties, range(runtime.getDeviceCount()))
        return versions, tuple(device["name"].decode() for device in properties)
    except runtime.CUDARuntimeError:  # no driver, no device
        return versions, ()


def _attention(device: int) -> tuple[str, str]:
    """Return the kernel for blocks on a device, and why the device cannot compute; one is empty."""
    cupy = import_module("cupy")
    with cupy.cuda.Device(device):
        found = obstacle(cupy)
        if found:
            return "", found
        x = cupy.zeros((1, 1, 1, 64), "float16")
        try:
            return str(choose(x, x, x, None)), ""
        except (RuntimeError, ValueError) as error:  # LVXATTN_KERNEL=cuda without support
            return "", str(error)


def _send_from_device(comm: MPI.Intracomm, xp: Any) -> bool:
    """Send a small and a large block around the ring as a pass does; return whether all arrived.

    Collective: every rank of comm calls this.  Unlike the self-test, which is one process, this
    covers the transport between processes and hosts.
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    whole = True
    for size in _BLOCKS:
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
