"""Detect a launcher that does not match the MPI library, so that every rank believes it is alone.

``mpiexec`` of one MPI, with a program that is linked to another, starts processes each of which is
rank 0 of 1; so does torchrun with any MPI.  Launchers pass the number of processes in the
environment.
"""

from collections.abc import Mapping
from typing import NamedTuple

# Variables with the number of processes and with the rank, and the launcher that sets them; inner
# launchers first, as srun may have started mpirun's helpers, and any of them torchrun.
_TORCHRUN = "torchrun or its like"
_VARIABLES = (
    ("WORLD_SIZE", "RANK", _TORCHRUN),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "Open MPI's mpirun"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MVAPICH's launcher"),
    ("PMI_SIZE", "PMI_RANK", "MPICH's mpiexec or its like"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
)
_CURES = {
    _TORCHRUN: "start the program with mpiexec; torchrun starts python -m lvxattn.torch_impl",
    # It starts the processes of any MPI, given its process-management interface.
    "srun": "use srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH (srun --mpi=list names others)",
}


class Claim(NamedTuple):
    """The number of processes that a launcher says it started, and the rank of this one."""

    variable: str
    size: int | None
    rank: int
    launcher: str


def claim(environment: Mapping[str, str]) -> Claim | None:
    """Return the claim of the launcher in the environment, if there is one.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    """
    for size, rank, launcher in _VARIABLES:
        if launcher == _TORCHRUN and number_in(environment, "LOCAL_RANK") is None:
            continue  # scripts use variables of these names, too
        if launcher == _TORCHRUN and environment.get(size) == "1":
            continue  # perhaps left over; a single rank is alone in any case
        number = number_in(environment, size)
        if number is not None:
            return Claim(size, number, number_in(environment, rank) or 0, launcher)
    number = number_in(environment, "PMIX_RANK")
    if number is not None:  # PMIx does not put the size into the environment
        return Claim("PMIX_RANK", None, number, "a PMIx launcher")
    return None


def number_in(environment: Mapping[str, str], name: str) -> int | None:
    """Return the number in a variable; None without one, or where it is no such number.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    name : str
    """
    text = environment.get(name, "")
    # Of the digits of all scripts, some make no int.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def bad_number(environment: Mapping[str, str]) -> str | None:
    """Return an error message if a variable of torchrun's has no number.

    Parameters
    ----------
    environment : mapping
        ``os.environ``, with the address of a process group.
    """
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if number_in(environment, name) is None:
            return f"{name}: expected a whole number, got {environment.get(name, '')!r:.40}"
    return None


def mismatch(environment: Mapping[str, str], size: int) -> str | None:
    """Return an error message if MPI sees fewer ranks than the launcher has started.

    MPI may see more where one launcher started another, as srun starts mpirun's helpers.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    size : int
        Size of MPI.COMM_WORLD.

    Returns
    -------
    str or None
        ``"<who started how many>, but MPI sees <size>: <what to do>"``.
    """
    said = claim(environment)
    if said is None:
        return None
    if said.size is None:
        if said.rank < size:
            return None
        number = f"started process {said.rank} (PMIX_RANK)"
    elif said.size <= size:
        return None
    else:
        number = f"started {said.size} processes ({said.variable})"
    cure = _CURES.get(
        said.launcher, "start the program with the launcher of the MPI that mpi4py uses"
    )
    return f"{said.launcher} {number}, but MPI sees {size}: {cure}"


def speaks(environment: Mapping[str, str], rank: int) -> bool:
    """Return whether this process is to print, even where all processes are rank 0."""
    said = claim(environment)
    return rank == 0 and (said is None or said.rank == 0)
