"""Whether MPI may be handed device memory, and how that is known.

    LVXATTN_CUDA_AWARE = 0 | 1   ->  that
    unset or auto                ->  the library says no  ->  no
                                     the library says yes ->  `self_test` in a process of its own
                                                              arrived: yes      anything else: no

A library's yes may be wrong, and that is a segmentation fault or, worse, wrong bytes.  So a program
of one process sends device memory to itself first.  Every process that asks does so once, for its
own device: what is true of one GPU need not be of another, and a question that is not collective
can hang nobody.  Ranks may differ: a message looks the same from whichever memory it is sent.

What the self-test proves is that the library was built for CUDA and copies what lies on this device
right.  It knows nothing of the ways from process to process, through shared memory
or a network: over those `doctor` sends device memory.  It says no, and blocks are staged, where a
second process may not use the GPU (compute mode "exclusive process") or a process without a
launcher cannot start MPI (as on some machines where srun alone can): there `LVXATTN_CUDA_AWARE=1`
after a look at `doctor` is the way.
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
"""What the self-test prints when it has passed."""
SELF_TEST_SECONDS = 60.0
"""How long the self-test may take; nearly all of it goes by in starting Python and CuPy."""

# What launchers tell their processes.  One that is to be alone must not know it.
_LAUNCHERS = re.compile(
    r"PMI|OMPI_|PRTE_|ORTE_|HYDRA_|HYDI_|MPIEXEC_|SLURM_|SRUN_|PALS_|ALPS_|FLUX_|MPI_LOCAL"
    r"|MV2_COMM_WORLD_|I_MPI_HYDRA_"
)
# Where an MPI lies that has been moved, and its transports, the user's choice and what is to be
# tested.  Variables of other kinds that choose them (UCX_, FI_, MPICH_) name no launcher.
_CHOICES = re.compile(
    r"(PMIX|PRTE)_PREFIX|OMPI_MCA_(accelerator|btl|coll|common|mca|mpi|mtl|opal|pml|rcache|smsc)"
    r"|OMPI_ALLOW_RUN_AS"
)
# MPICH is libmpich in Debian and in old Crays; with MPI 5's binary interface it is libmpi_abi.
_LIBMPI = re.compile(r"libmpi(ch)?(_(abi|amd|cray|gnu|intel|nvidia)\w*)?\.so")


def cuda_aware(xp: Any = None, device: int | None = None) -> tuple[bool, str]:
    """Tell whether MPI may be handed device memory, and how that was decided.

    Not collective.  ``LVXATTN_CUDA_AWARE`` = 0 or 1 decides; unset or ``auto`` asks the library and
    has a yes proved by a self-test, once in a process for each device: that takes seconds.

    Parameters
    ----------
    xp : module, optional
        cupy, which is what it is unless given.
    device : int, optional
        The current one unless given.

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
    """Return what ``LVXATTN_CUDA_AWARE`` says: auto, unless it is set, 0 or 1.

    Raises
    ------
    ValueError
        It says something else.
    """
    said = os.environ.get("LVXATTN_CUDA_AWARE") or "auto"
    if said not in ("auto", "0", "1"):
        raise ValueError(f"LVXATTN_CUDA_AWARE: expected auto, 0 or 1, got {said!r}")
    return said


@cache
def library_says() -> tuple[bool, str]:
    """Return what the MPI library says, and how it was asked.  Not collective."""
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


@cache
def self_test(package: str, device: int) -> tuple[bool, str]:
    """Send device memory to oneself in a process of its own.  Not collective.

    Parameters
    ----------
    package : str
        The name of cupy.
    device : int

    Returns
    -------
    arrived : bool
    how : str
        What happened, in a few words.
    """
    program = "-m", "lvxattn.mpi_impl.transport.self_test", package, str(device)
    return outcome([sys.executable, "-P", *program], SELF_TEST_SECONDS)


def outcome(command: Sequence[str], seconds: float) -> tuple[bool, str]:
    """Run a self-test alone, and return whether it passed and what happened.

    It passes if it ends with status 0 and says so: nothing else counts.

    Parameters
    ----------
    command : sequence of str
    seconds : float
        After which it is killed, with all that it has started.
    """
    # Files, not pipes: a process that it has left behind would keep a pipe open.
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
    """Return the environment of a process that MPI is to take for the only one.

    It has the same transports and finds the same packages.

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
