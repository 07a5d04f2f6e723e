"""The processes of a check with ``--distributed``: who speaks, and how all end alike."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from lvxattn.check.ranks import launched_by_torchrun
from lvxattn.cli.arguments import UsageError
from lvxattn.common.launcher import mismatch, speaks


def rank_of(argv: Sequence[str]) -> int:
    """Return the number of this process among those that were started together.

    Parameters
    ----------
    argv : sequence of str
        Without ``--distributed`` among them every process is alone, and 0.
    """
    if "--distributed" not in argv:
        return 0
    if launched_by_torchrun():
        return int(os.environ["RANK"])
    world = _world()
    if world is None:
        return 0
    return 0 if speaks(os.environ, world.rank) else max(1, int(world.rank))


def check_launcher(argv: Sequence[str]) -> None:
    """Refuse ranks that all believe to be alone.

    Raises
    ------
    UsageError
        The launcher has started more of them than MPI sees.
    """
    world = _world() if "--distributed" in argv and not launched_by_torchrun() else None
    wrong = None if world is None else mismatch(os.environ, world.size)
    if wrong:
        raise UsageError(wrong)


def allgather(x: Any, device: str | None) -> list[Any]:
    """Return what each rank has given.  Collective: every rank calls this.

    Under torchrun the default process group is made, if there is none; with NCCL for the blocks on
    CUDA devices, if each rank of this host can have its own.
    """
    if launched_by_torchrun():
        import torch.distributed as dist
        from torch.cuda import device_count

        if not dist.is_initialized():
            enough = device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            cuda = (device or "").startswith("cuda") and enough
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, x)
        return every
    world = _world()
    return [x] if world is None else list(world.allgather(x))


def leave() -> None:
    """End MPI and PyTorch's process group, if they were begun.

    ``python -m mpi4py`` ends the other ranks by force if a rank's exit status is not 0 and MPI has
    not ended by then; that is for the rank that fails alone.
    """
    sys.stdout.flush()
    if "mpi4py.MPI" in sys.modules:
        MPI = sys.modules["mpi4py.MPI"]
        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()
    if launched_by_torchrun() and "torch.distributed" in sys.modules:
        dist = sys.modules["torch.distributed"]
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # the latter: no MPI library
        return None
    return MPI.COMM_WORLD
