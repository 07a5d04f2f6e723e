"""Does the launcher know the MPI library?  If not, every rank believes that it is alone.

``mpiexec -n 4`` of one MPI, with a program that is linked to another, starts four processes each of
which is rank 0 of 1; so does torchrun, whatever MPI there is.  Launchers tell their processes in
the environment how many they are.
"""

from collections.abc import Mapping
from typing import NamedTuple

# How many processes there are, which one this is, and who says so; inner launchers first, as srun
# may have started mpirun's helpers, and any of them torchrun.
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
    # It starts the processes of any MPI, if it is told what that speaks.
    "srun": "say srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH (srun --mpi=list names others)",
}


class Claim(NamedTuple):
    """What a launcher says: how many processes it has started, and which of them this is."""

    variable: str
    size: int | None
    rank: int
    launcher: str


def claim(environment: Mapping[str, str]) -> Claim | None:
    """Return what the launcher says, if there is one.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    """
    for size, rank, launcher in _VARIABLES:
        if launcher == _TORCHRUN and not environment.get("LOCAL_RANK", "").isdigit():
            continue  # scripts have variables of these names, too
        if launcher == _TORCHRUN and environment.get(size) == "1":
            continue  # left over, perhaps, and alone is what every rank is in any case
        if environment.get(size, "").isdigit():
            number = environment.get(rank, "0")
            return Claim(size, int(environment[size]), int(number or 0), launcher)
    number = environment.get("PMIX_RANK", "")
    if number.isdigit():  # PMIx does not tell the size in the environment
        return Claim("PMIX_RANK", None, int(number), "a PMIx launcher")
    return None


def mismatch(environment: Mapping[str, str], size: int) -> str | None:
    """Say that MPI sees fewer ranks than the launcher has started, if so, and what cures that.

    It may well see more: of what started another launcher, as srun starts mpirun's helpers.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    size : int
        Of MPI.COMM_WORLD.

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
    """Whether this process is the one to print, even where all believe to be rank 0."""
    said = claim(environment)
    return rank == 0 and (said is None or said.rank == 0)
