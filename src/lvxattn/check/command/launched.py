"""The processes of a check with ``--distributed``: which one prints, and how all end."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from lvxattn.check.ranks import launched_by_torchrun
from lvxattn.cli.arguments import UsageError
from lvxattn.common.launcher import bad_number, mismatch, number_in, speaks


def rank_of(argv: Sequence[str]) -> int:
    """Return the rank of this process, or 0 without ``--distributed`` in argv."""
    if "--distributed" not in argv:
        return 0
    if launched_by_torchrun():
        return number_in(os.environ, "RANK") or 0
    world = _world()
    if world is None:
        return 0
    return 0 if speaks(os.environ, world.rank) else max(1, int(world.rank))


def check_launcher(argv: Sequence[str]) -> None:
    """Raise a UsageError if the launcher started more processes than MPI or PyTorch knows of."""
    if "--distributed" not in argv:
        return
    if launched_by_torchrun():
        wrong = bad_number(os.environ)
    else:
        world = _world()
        wrong = None if world is None else mismatch(os.environ, world.size)
    if wrong:
        raise UsageError(wrong)


def allgather(x: Any, device: str | None) -> list[Any]:
    """Return every rank's x.  Collective: every rank calls this.

    Under torchrun this initializes the default process group if necessary, with NCCL for tensors on
    CUDA devices if each rank of this host has its own.
    """
    if launched_by_torchrun():
        import torch.distributed as dist

        from lvxattn.check.ranks.torch_processes import init_process_group

        if not dist.is_initialized():
            init_process_group(device)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, x)
        return every
    world = _world()
    return [x] if world is None else list(world.allgather(x))


def leave() -> None:
    """Finalize MPI and PyTorch's process group, if initialized.

    Otherwise ``python -m mpi4py`` would abort the other ranks if this one exits with another status
    than 0.
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
