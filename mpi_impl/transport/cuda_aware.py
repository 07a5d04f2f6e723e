"""Whether MPI supports device memory (is CUDA-aware): query the library, and verify a yes.

    LVXATTN_CUDA_AWARE = 0 | 1   ->  no | yes
    unset or auto                ->  the library says no  ->  no
                                     the library says yes ->  `self_test` in a process of its own
                                                              arrived: yes      anything else: no

A wrong yes of the library leads to a segmentation fault or, worse, wrong bytes.  So a program of
one process first sends device memory to itself.  Every rank runs it once for its own device: GPUs
may differ, and a test that is not collective cannot hang other ranks.  Ranks may come to different
results, as messages are the same from device and host memory.

The self-test verifies that the library was built for CUDA and copies memory of this device
correctly.  It does not test transfers between processes, through shared memory or a network:
`doctor` does.  It fails, and blocks are staged, where a second process may not use the GPU (compute
mode "exclusive process"), or where a process without a launcher cannot start MPI, as where only
srun can.  In these cases check with `doctor` and set `LVXATTN_CUDA_AWARE=1`.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from tempfile import TemporaryFile
from typing import Any

from mpi4py import MPI

ARRIVED = "device memory arrived"
"""The output of a self-test that has passed."""
SELF_TEST_SECONDS = 60.0
"""The time limit of the self-test, most of which is spent in starting Python and CuPy."""

# Variables that launchers set, which a process that runs alone must not have.
_LAUNCHERS = re.compile(
    r"PMI|OMPI_|PRTE_|ORTE_|HYDRA_|HYDI_|MPIEXEC_|SLURM_|SRUN_|PALS_|ALPS_|FLUX_|MPI_LOCAL"
    r"|MV2_COMM_WORLD_|I_MPI_HYDRA_"
)
# But these choose the location of a moved MPI, and the transports that are to be tested.  Variables
# of other kinds that choose transports (UCX_, FI_, MPICH_) are not of launchers.
_CHOICES = re.compile(
    r"(PMIX|PRTE)_PREFIX|OMPI_MCA_(accelerator|btl|coll|common|mca|mpi|mtl|opal|pml|rcache|smsc)"
    r"|OMPI_ALLOW_RUN_AS"
)
# MPICH is libmpich in Debian and on old Crays, and libmpi_abi with MPI 5's binary interface.
_LIBMPI = re.compile(r"libmpi(ch)?(_(abi|amd|cray|gnu|intel|nvidia)\w*)?\.so")


def cuda_aware(xp: Any = None, device: int | None = None) -> tuple[bool, str]:
    """Return whether MPI supports device memory, and how that was decided.

    Not collective.  ``LVXATTN_CUDA_AWARE`` = 0 or 1 decides; unset or ``auto`` queries the library
    and verifies a yes by a self-test, once per process and device, which takes seconds.

    Parameters
    ----------
    xp : module, optional
        Default: cupy.
    device : int, optional
        Default: the current one.

    Returns
    -------
    aware : bool
    why : str

    Raises
    ------
    ValueError
        As `wish`.
    """
    decided = wish()
    if decided != "auto":
        return decided == "1", f"LVXATTN_CUDA_AWARE={decided}"
    says, why = library_says()
    if not says:
        return False, why
    if device is None:
        device = 0 if xp is None else xp.cuda.Device().id
    proved, how = self_test("cupy" if xp is None else xp.__name__, device)
    return proved, f"{why} and a self-test: {how}"


def wish() -> str:
    """Return the value of ``LVXATTN_CUDA_AWARE``, auto (default), 0 or 1.

    Raises
    ------
    ValueError
        It has another value.
    """
    said = os.environ.get("LVXATTN_CUDA_AWARE") or "auto"
    if said not in ("auto", "0", "1"):
        raise ValueError(f"LVXATTN_CUDA_AWARE: expected auto, 0 or 1, got {said!r}")
    return said


@cache
def library_says() -> tuple[bool, str]:
    """Return the answer of the MPI library, and the name of the query.  Not collective."""
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
    # A kind may have restrictors, as in cuda:device.
    return any(kind.partition(":")[0] == "cuda" for kind in kinds), "mpi_memory_alloc_kinds"


@cache
def self_test(package: str, device: int) -> tuple[bool, str]:
    """Send device memory from a separate process to itself.  Not collective.

    Parameters
    ----------
    package : str
        The name of cupy.
    device : int

    Returns
    -------
    arrived : bool
    how : str
        The outcome in a few words.
    """
    program = "-m", "lvxattn.mpi_impl.transport.self_test", package, str(device)
    return outcome([sys.executable, "-P", *program], SELF_TEST_SECONDS)


def outcome(command: Sequence[str], seconds: float) -> tuple[bool, str]:
    """Run a self-test alone, and return whether it passed and the outcome in words.

    It has passed if it ends with status 0 and prints `ARRIVED`.

    Parameters
    ----------
    command : sequence of str
    seconds : float
        The time after which it is killed, with all processes that it has started.
    """
    # Files, not pipes: a process left behind would keep a pipe open.
    with TemporaryFile("w+") as said, TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                command, env=alone(os.environ), stdin=subprocess.DEVNULL, stdout=said,
                stderr=errors, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return False, f"did not start ({error})"
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False, f"not done after {seconds:g} s"
        said.seek(0)
        errors.seek(0)
        if status == 0 and said.read().strip().endswith(ARRIVED):
            return True, ARRIVED
        lines = errors.read(100_000).strip().splitlines()
    last = f" ({lines[-1].strip()[:200]})" if lines else ""
    if status < 0:
        return False, f"ended by {signal.Signals(-status).name}{last}"
    return False, f"failed with status {status}{last}"


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a process that MPI runs as the only one.

    It has the same transports and packages.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if _CHOICES.match(name) or not _LAUNCHERS.match(name)
    }
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _libmpi() -> str | None:
    """Return the path of the MPI library that this process has loaded."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if _LIBMPI.match(os.path.basename(path)):
                return "/" + path
    return None
