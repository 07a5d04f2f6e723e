"""The ranks on which a distributed function is checked: processes of MPI or PyTorch, or threads."""

import os

from lvxattn.check.ranks.caller import RanksCaller
from lvxattn.check.ranks.tasks import Ranks
from lvxattn.check.ranks.threads import VirtualRanks

# The variables that torchrun sets.
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


def launched_by_torchrun() -> bool:
    """Whether the environment has the address of a process group."""
    return all(os.environ.get(name) for name in _TORCHRUN)


def ranks_of(virtual: int | None, time_limit: float, device: str | None) -> Ranks:
    """Return the launcher's ranks, or virtual ones.

    Collective, unless the ranks are virtual.

    Parameters
    ----------
    virtual : int, optional
        Number of virtual ranks; default: the launcher's ranks.
    time_limit : float
        Seconds per task.
    device : str, optional
        Of PyTorch's tensors.

    Raises
    ------
    ValueError, ModuleNotFoundError, RuntimeError
        virtual is below 1; there is neither torchrun nor mpi4py; MPI has no thread support.
    """
    if virtual is not None:
        return VirtualRanks(virtual, time_limit)
    if launched_by_torchrun():
        from lvxattn.check.ranks.torch_processes import TorchProcesses

        return TorchProcesses(time_limit, device)
    try:
        from lvxattn.check.ranks.mpi_processes import MPIProcesses
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ranks: expected torchrun, or mpiexec and mpi4py, or a number of virtual ranks: "
            f"{error}",
            name=error.name,
        ) from None
    return MPIProcesses(time_limit)


__all__ = ["Ranks", "RanksCaller", "VirtualRanks", "launched_by_torchrun", "ranks_of"]
