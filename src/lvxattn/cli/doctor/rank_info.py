"""What a rank tells: its host and limits, seen by the operating system, and its software."""

import hashlib
import os
import platform
import re
import resource
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np

import lvxattn
from lvxattn.cli.doctor.network import addresses
from lvxattn.common.launcher import number_in
from lvxattn.common.shared_memory import unmapped_files

SHARED_MEMORY = "/dev/shm"
INFINIBAND = "/sys/class/infiniband"
_DRIVER = "/proc/driver/nvidia/version"
LIMITS = {
    "locked memory": resource.RLIMIT_MEMLOCK,
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "core file": resource.RLIMIT_CORE,
}


@dataclass(frozen=True)
class Environment:
    """What the operating system says about a rank.

    Attributes
    ----------
    host : str
    cores : frozenset of int
        The cores that this process may run on.
    offered : int
        The number of cores that its launcher may use on this host.
    addresses : dict
        IPv4 addresses by interface, without the loopback's.
    shm : tuple of int
        Size of /dev/shm and what is free, in bytes; zeros if there is none.
    limits : dict
        Soft limits by the names of `LIMITS`; None is unlimited.
    tasks : int
        Processes and threads of this user, if their number is limited.
    infiniband : bool
        Whether the host has InfiniBand devices.
    gpu_files : int
        Number of GPUs that the operating system shows.
    folder, prefix : str
        The current folder, and that of the Python environment.
    code : str
        Digest of the package's source; on the first rank of a host.
    forgotten : tuple of str
        Files of ended MPI jobs in this host's shared memory; on the first rank of a host.
    common_versions : dict
        Of the package, Python, NumPy and the GPU driver.
    """

    host: str
    cores: frozenset[int]
    offered: int
    addresses: dict[str, str] = field(default_factory=dict)
    shm: tuple[int, int] = (2**36, 2**36)
    limits: dict[str, int | None] = field(default_factory=dict)
    tasks: int = 0
    infiniband: bool = False
    gpu_files: int = 0
    folder: str = ""
    prefix: str = ""
    code: str = ""
    forgotten: tuple[str, ...] = ()
    common_versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RankInfo(Environment):
    """What a rank tells of itself.

    Attributes
    ----------
    transport : tuple of str
        What sends messages, ``"MPI"`` or ``"backend"``, and its name and version.
    versions : dict
        Of the libraries of this implementation.
    arrays : str
        What computes on the host.
    gpus : str
        What computes on GPUs, or why there is none.
    devices : tuple of str
        The GPUs that it sees.
    threads : int
        Threads that compute.
    threads_name : str
        What they are called.
    threads_from : str
        What set their number.
    interface_from : str
        The variable that selects the interface between hosts, with its value; else empty.
    details : dict
        More lines of the report, by label.
    remarks : tuple of str
        Advice that concerns this implementation only.
    obstacle : str
        Why this rank cannot compute on its GPU; empty if it can.
    """

    transport: tuple[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    arrays: str = ""
    gpus: str = ""
    devices: tuple[str, ...] = ()
    threads: int = 1
    threads_name: str = "threads"
    threads_from: str = "cores divided by ranks"
    interface_from: str = ""
    details: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    obstacle: str = ""


def look_around(number: int) -> Environment:
    """Return what the operating system says.  Not collective.

    Parameters
    ----------
    number : int
        Number of this rank on its host.
    """
    limits = {name: _soft(which) for name, which in LIMITS.items()}
    return Environment(
        host=socket.gethostname(),
        cores=frozenset(os.sched_getaffinity(0)),
        offered=_offered(os.environ),
        addresses=addresses(),
        shm=_shared_memory(),
        limits=limits,
        # Root has no such limit.
        tasks=_tasks() if limits["processes"] is not None and os.getuid() else 0,
        infiniband=bool(glob(f"{INFINIBAND}/*")),
        gpu_files=len(glob("/dev/nvidia[0-9]*")),
        folder=_folder(),
        prefix=sys.prefix,
        code="" if number else _digest(Path(lvxattn.__file__).parent),
        forgotten=() if number else tuple(map(str, unmapped_files())),
        common_versions={
            "lvxattn": lvxattn.__version__,
            "Python": platform.python_version(),
            "NumPy": np.__version__,
            **_driver(),
        },
    )


def first_variable(names: tuple[str, ...]) -> str:
    """Return the first of these variables that is set, as ``"NAME=value"``; else empty."""
    return next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), "")


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it has been removed
        return ""


def _soft(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _offered(environment: Mapping[str, str]) -> int:
    """Return the number of cores of the launcher, which has not bound itself."""
    most, process = len(os.sched_getaffinity(0)), os.getpid()
    with suppress(OSError, ValueError):
        for _ in range(3):  # a shell or taskset may be between
            stat = Path(f"/proc/{process}/stat").read_text()
            process = int(stat.rpartition(")")[2].split()[1])  # a name may hold anything but )
            if process <= 1:
                break
            most = max(most, len(os.sched_getaffinity(process)))
    # Slurm's daemon has all cores, also those of other jobs.
    return min(most, number_in(environment, "SLURM_CPUS_ON_NODE") or most)


def _shared_memory() -> tuple[int, int]:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0, 0
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _tasks() -> int:
    """Return the number of processes and threads of this user."""
    number, user = 0, os.getuid()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if process.stat().st_uid == user:
                number += len(os.listdir(process / "task"))
    return number


def _digest(folder: Path) -> str:
    """Return a digest of the source below a folder."""
    found = hashlib.sha256()
    # Each implementation is a link, which a pattern would not follow.
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                with suppress(OSError):
                    found.update(name.encode() + Path(path, name).read_bytes())
    return found.hexdigest()


def _driver() -> dict[str, str]:
    with suppress(OSError):
        if match := re.search(r"\s(\d+\.[\d.]+)\s", Path(_DRIVER).read_text()):
            return {"NVIDIA driver": match[1]}
    return {}
