"""The ranks on which a distributed function is checked: of MPI, of PyTorch, or threads."""

import os

from lvxattn.check.ranks.outcome import Outcome, joined
from lvxattn.check.ranks.ranks import Ranks, Task, Together
from lvxattn.check.ranks.virtual import VirtualRanks

# What torchrun sets, or whoever sets what it sets.
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


def launched_by_torchrun() -> bool:
    """Whether the environment says where the ranks of a process group meet."""
    return all(os.environ.get(name) for name in _TORCHRUN)


def ranks_of(wish: int | None, time_limit: float, device: str | None) -> Ranks:
    """Return the ranks that there are.

    Collective, unless the ranks are virtual.

    Parameters
    ----------
    wish : int, optional
        That many virtual ranks; the launcher's unless given.
    time_limit : float
        Seconds that a task may take.
    device : str, optional
        Where PyTorch's tensors will be.

    Raises
    ------
    ValueError, ModuleNotFoundError, RuntimeError
        The wish is below 1; there is no torchrun and no mpi4py; MPI has no thread support.
    """
    if wish is not None:
        return VirtualRanks(wish, time_limit)
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


__all__ = ["Outcome", "Ranks", "Task", "Together", "joined", "launched_by_torchrun", "ranks_of"]
