"""The ranks of a program, as torchrun starts them: their process group, threads and devices.

torchrun tells its processes in the environment who they are.  Without it a program is one rank.

    RANK WORLD_SIZE        which process of how many
    MASTER_ADDR, _PORT     where they meet
    LOCAL_RANK             which of its host's: it picks the GPU
    OMP_NUM_THREADS        1, where the user has not set it: not a wish, and `limit_threads` knows
    LVXATTN_TIMEOUT        ours: the process group's timeout in seconds; PyTorch's own unless set

Objects and tensors of the host go through gloo.  Blocks of GPUs go through NCCL where each rank of
the program has a GPU of its own, else through the host's memory and gloo.
"""

import atexit
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lvxattn.cli.arguments import UsageError
from lvxattn.cli.tensors import InputError
from lvxattn.common.validation import check_seconds, raise_together
from lvxattn.torch_impl.group import Group

# Whoever sets one of these has decided how many threads PyTorch uses.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# How many processes there are, as torchrun, Open MPI, MPICH and srun say.  Not SLURM_NTASKS: a
# batch script has it too, and is one process.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_TIMEOUT = "LVXATTN_TIMEOUT"


@contextmanager
def world() -> Iterator[Group]:
    """Start the process group that the environment describes, and end it when all is done.

    Collective: every rank of the program calls this.  A group that is there already is used, and
    left alone.  After an exception on one rank the group is left to the end of the process, when
    what was raised has been printed: the others may be waiting in it, and will be ended by its end.

    Yields
    ------
    Group
        All ranks, or this process alone where no launcher says anything else.
    """
    ours = not dist.is_initialized() and launched(os.environ)
    if ours:
        dist.init_process_group("gloo", timeout=_timeout())
    try:
        # Alone without a warning: `check_environment` has words for processes that are lost.
        yield Group.of(None) if dist.is_initialized() else Group(None)
    except BaseException:
        if ours:  # by then Python has printed what was raised
            atexit.register(_end)
        raise
    if ours:
        # torchrun ends all ranks as soon as one has ended with a status other than 0: by then
        # whoever has something to say must have said it.
        dist.barrier()
        dist.destroy_process_group()


def _end() -> None:
    """End gloo's threads: one that is alive when Python ends may abort the process.

    They live as long as anything refers to the group, as the frames of a traceback do.
    """
    for name in ("last_exc", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    dist.destroy_process_group()


def check_environment(group: Group) -> None:
    """Refuse a bad ``LVXATTN_TIMEOUT``, whichever rank has it, and a launcher that is no torchrun.

    Collective: every rank of the group calls this.

    Raises
    ------
    UsageError
        It is not a number of seconds, or other processes were started that this one cannot find;
        the same on all ranks.
    """
    error = None
    if group.group is None and (lost := lost_ranks(os.environ)):
        raise UsageError(f"lvxattn: error: {lost}")
    try:
        check_seconds(_TIMEOUT, os.environ.get(_TIMEOUT))
    except ValueError as problem:
        error = UsageError(f"lvxattn: error: {problem}")
    raise_together(error, group)


def _timeout() -> timedelta | None:
    """Return what ``LVXATTN_TIMEOUT`` allows; `check_environment` speaks of what is no number."""
    try:
        seconds = check_seconds(_TIMEOUT, os.environ.get(_TIMEOUT))
    except ValueError:
        return None
    return None if seconds is None else timedelta(seconds=seconds)


def launched(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, or whoever sets what it sets, has started this process."""
    return all(environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def lost_ranks(environment: Mapping[str, str]) -> str | None:
    """Say that a launcher has started several processes and told them too little, if so.

    Each would believe to be alone, and do all the work.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    """
    for name in SIZES:
        size = environment.get(name, "")
        if size.isdigit() and int(size) > 1 and not launched(environment):
            return (
                f"one of {size} processes ({name} = {size}) that cannot find one another: start "
                "them with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
    return None


def limit_threads(group: Group) -> int:
    """Give each rank its share of its host's cores, unless the user has set `THREAD_VARIABLES`.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    group : Group

    Returns
    -------
    int
        How many threads this rank computes with from now on.
    """
    mine = socket.gethostname()
    by_rank = group.allgather((mine, os.sched_getaffinity(0)))
    on_host = [cores for host, cores in by_rank if host == mine]
    # A launcher may have bound ranks to cores of their own, or let all of them have all.
    cores = frozenset[int]().union(*on_host)
    if not user_set_threads(os.environ, _environment_of_torchrun()):
        torch.set_num_threads(max(1, len(cores) // len(on_host)))
    return torch.get_num_threads()


def user_set_threads(environment: Mapping[str, str], before: Mapping[str, str] | None) -> bool:
    """Tell whether the user has decided how many threads a rank has.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    before : mapping, optional
        What torchrun was started with, where that is known.  It sets OMP_NUM_THREADS to 1 where the
        user has left it unset and a host has several ranks, and warns of that.
    """
    if "TORCHELASTIC_RUN_ID" in environment and environment.get("OMP_NUM_THREADS") == "1":
        environment = {**environment, "OMP_NUM_THREADS": (before or {}).get("OMP_NUM_THREADS", "")}
    return any(environment.get(name) for name in THREAD_VARIABLES)


def _environment_of_torchrun() -> dict[str, str] | None:
    """Return what torchrun was started with, where ``/proc`` tells."""
    process = os.getppid()
    try:
        while process > 1:
            lines = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
            found = dict(line.split("=", 1) for line in lines.split("\0") if "=" in line)
            if "TORCHELASTIC_RUN_ID" not in found:  # what it starts, as a wrapper's shell, has it
                return found
            state = Path(f"/proc/{process}/stat").read_text()
            process = int(state.rpartition(")")[2].split()[1])  # a name may hold anything but )
    except OSError:
        pass
    return None


def choose_device(wish: str, group: Group) -> tuple[torch.device, Group]:
    """Give each rank of a host a GPU, in turn where there are fewer, or the host's cores.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    wish : str
        ``"cpu"``, ``"gpu"`` or ``"auto"``: GPUs where every rank finds one.
    group : Group
        Of `world`.

    Returns
    -------
    device : torch.device
        The current one from now on, if a GPU.
    group : Group
        What blocks on these devices travel over.

    Raises
    ------
    InputError
        GPUs are wanted and a rank has none; the same on all ranks.
    """
    if wish == "cpu":
        return torch.device("cpu"), group
    problem = _obstacle()
    if wish == "gpu":
        raise_together(InputError(problem) if problem else None, group)
    elif any(group.allgather(problem)):
        return torch.device("cpu"), group
    # Where each rank is shown its own GPU only, LOCAL_RANK counts further than there are.
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    gpu = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    alone = len(set(group.allgather(gpu))) == group.size
    if group.size == 1 or not alone or not dist.is_nccl_available():
        return device, group
    return device, Group(dist.new_group(backend="cpu:gloo,cuda:nccl", timeout=_timeout()))


def _obstacle() -> str | None:
    """Say why this rank cannot compute on a GPU, if so."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "--device gpu: this build of PyTorch is for CPUs only"
    return None if torch.cuda.is_available() else "--device gpu: no GPU found"
