"""The ranks of a program, as torchrun starts them: their process group, threads and devices.

torchrun describes the group in the environment.  Without it a program is one rank.

    RANK WORLD_SIZE        this rank and the number of ranks
    MASTER_ADDR, _PORT     where they meet
    LOCAL_RANK             this rank on its host: selects the GPU
    OMP_NUM_THREADS        1 where the user has not set it; `limit_threads` ignores that
    LVXATTN_TIMEOUT        the process group's timeout in seconds (default: PyTorch's own)

torchrun ends its ranks if one fails, but a stopped one only after half a minute, and none if it is
killed itself.  So the ranks end with torchrun, and one that fails ends the stopped ones first.

Objects and host tensors go through gloo.  Blocks on GPUs go through NCCL where each rank has a GPU
of its own, otherwise through host memory and gloo.
"""

import atexit
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from lvxattn.cli.arguments import UsageError
from lvxattn.cli.tensors import InputError
from lvxattn.common.launcher import bad_number, number_in
from lvxattn.common.processes import end_with_parent, stopped_ranks
from lvxattn.common.validation import check_seconds, raise_together
from lvxattn.torch_impl.group import Group

T = TypeVar("T")

# Each of these sets the number of PyTorch's threads.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# The number of processes by torchrun, Open MPI, MPICH and srun.  Not SLURM_NTASKS: a batch script,
# which is one process, has it too.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_TIMEOUT = "LVXATTN_TIMEOUT"
_RUN = "TORCHELASTIC_RUN_ID"  # set for all that torchrun starts


@contextmanager
def world(
    meet: Callable[[], tuple[Any, int, int]] | None = None, patience: float | None = None
) -> Iterator[Group]:
    """Initialize the process group that the environment describes, and destroy it at the end.

    Collective: every rank of the program calls this.  An existing group is used and kept.  After an
    exception the group lives until the process ends, when the exception has been printed: other
    ranks may be waiting in it, and end with it.

    Parameters
    ----------
    meet : callable, optional
        Returns the store by which ranks meet, this rank and the number of ranks (default:
        PyTorch's, as the environment describes it).
    patience : float, optional
        The group's timeout in seconds, unless ``LVXATTN_TIMEOUT`` says otherwise.

    Yields
    ------
    Group
        All ranks; this process alone without a launcher.
    """
    ours = not dist.is_initialized() and launched(os.environ) and not bad_number(os.environ)
    if ours:
        if _RUN in os.environ:
            # Should torchrun have ended before this line, nobody answers in the next one.
            end_with_parent(os.getppid())
        timeout = group_timeout() or (timedelta(seconds=patience) if patience else None)
        where: dict[str, Any] = {}
        if meet is not None:
            store, rank, size = meet()
            where = {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group("gloo", timeout=timeout, **where)
    try:
        # No warning here if alone: `check_environment` reports lost processes.
        group = Group.of(None) if dist.is_initialized() else Group(None)
        yield group
        if ours:
            # torchrun ends all ranks as soon as one exits with a status other than 0: by then all
            # must have printed.
            with group.waiting(lambda: "all ranks to end"):
                dist.barrier()
    except BaseException:
        if ours:  # by then Python has printed what was raised
            atexit.register(_end)
        raise
    if ours:
        dist.destroy_process_group()


def _end() -> None:
    """End torchrun's stopped ranks of this host, and gloo's threads.

    A thread that runs while Python exits may abort the process.  They live as long as the group is
    referenced, as by the frames of a traceback.
    """
    if _RUN in os.environ:  # or what is stopped may be the user's, with RANK exported in a shell
        for process in stopped_ranks(_RUN).values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    for name in ("last_exc", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    dist.destroy_process_group()


def check_environment(group: Group) -> None:
    """Validate ``LVXATTN_TIMEOUT`` on all ranks, and the launcher.

    Collective: every rank of the group calls this.

    Raises
    ------
    UsageError
        The variable is not a number of seconds above 0, a launcher's variable is no number, or the
        launcher has started processes that cannot find one another; the same on all ranks.
    """
    error = None
    if group.group is None:
        alone = bad_number(os.environ) if launched(os.environ) else lost_ranks(os.environ)
        if alone:
            raise UsageError(f"lvxattn: error: {alone}")
    try:
        check_seconds(_TIMEOUT, os.environ.get(_TIMEOUT))
    except ValueError as problem:
        error = UsageError(f"lvxattn: error: {problem}")
    raise_together(error, group)


def group_timeout() -> timedelta | None:
    """Return ``LVXATTN_TIMEOUT``, if valid; `check_environment` reports others."""
    try:
        seconds = check_seconds(_TIMEOUT, os.environ.get(_TIMEOUT))
    except ValueError:
        return None
    return None if seconds is None else timedelta(seconds=seconds)


def launched(environment: Mapping[str, str]) -> bool:
    """Return whether the environment has what torchrun sets."""
    return all(environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def lost_ranks(environment: Mapping[str, str]) -> str | None:
    """Return an error message if a launcher has started processes that cannot find one another.

    Each would run as the only rank, and do all the work.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    """
    for name in SIZES:
        size = number_in(environment, name) or 0
        if size > 1 and not launched(environment):
            return (
                f"one of {size} processes ({name} = {size}) that cannot find one another: start "
                "them with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
    return None


def limit_threads(group: Group) -> int:
    """Divide each host's cores among its ranks, unless the user has set `THREAD_VARIABLES`.

    Collective: every rank of the group calls this.

    Returns
    -------
    int
        This rank's number of threads.
    """
    mine = socket.gethostname()
    by_rank = group.allgather((mine, os.sched_getaffinity(0)))
    group.hosts = [host for host, _ in by_rank]
    on_host = [cores for host, cores in by_rank if host == mine]
    # A launcher may have bound ranks to different cores, or all of them to all.
    cores = frozenset[int]().union(*on_host)
    if not user_set_threads(os.environ, environment_of_torchrun()):
        torch.set_num_threads(max(1, len(cores) // len(on_host)))
    return torch.get_num_threads()


def user_set_threads(environment: Mapping[str, str], before: Mapping[str, str] | None) -> bool:
    """Return whether the user has set the number of threads.

    Parameters
    ----------
    environment : mapping
        ``os.environ``.
    before : mapping, optional
        torchrun's own environment, if known.  torchrun sets OMP_NUM_THREADS to 1 if it is unset and
        a host has several ranks, and warns of that.
    """
    if _RUN in environment and environment.get("OMP_NUM_THREADS") == "1":
        environment = {**environment, "OMP_NUM_THREADS": (before or {}).get("OMP_NUM_THREADS", "")}
    return any(environment.get(name) for name in THREAD_VARIABLES)


def environment_of_torchrun() -> dict[str, str] | None:
    """Return torchrun's own environment, or None without ``/proc``."""
    process = os.getppid()
    try:
        while process > 1:
            lines = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
            found = dict(line.split("=", 1) for line in lines.split("\0") if "=" in line)
            if _RUN not in found:
                return found
            state = Path(f"/proc/{process}/stat").read_text()
            process = int(state.rpartition(")")[2].split()[1])  # a name may hold anything but )
    except OSError:
        pass
    return None


def choose_device(wish: str, group: Group) -> tuple[torch.device, Group]:
    """Assign GPUs to the ranks of each host, shared where there are fewer, or the CPU.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    wish : str
        ``"cpu"``, ``"gpu"``, or ``"auto"``: GPUs if every rank has one.
    group : Group
        As `world` yields it.

    Returns
    -------
    device : torch.device
        Set as the current device, if a GPU.
    group : Group
        The group that blocks on these devices are sent over.

    Raises
    ------
    InputError
        GPUs are required and a rank has none; the same on all ranks.
    """
    if wish == "cpu":
        return torch.device("cpu"), group
    problem = _obstacle()
    if wish == "gpu":
        raise_together(InputError(problem) if problem else None, group)
    elif any(group.allgather(problem)):
        return torch.device("cpu"), group
    # Where each rank sees its own GPU only, LOCAL_RANK exceeds their number.
    number = (number_in(os.environ, "LOCAL_RANK") or 0) % torch.cuda.device_count()
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    gpu = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    alone = len(set(group.allgather(gpu))) == group.size
    if group.size == 1 or not alone or not dist.is_nccl_available():
        return device, group
    return device, Group(dist.new_group(backend="cpu:gloo,cuda:nccl", timeout=group_timeout()))


def _obstacle() -> str | None:
    """Return why this rank cannot compute on a GPU, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "--device gpu: this build of PyTorch is for CPUs only"
    return None if torch.cuda.is_available() else "--device gpu: no GPU found"


def on_rank_0(act: Callable[[], object], failure: str, group: Group) -> None:
    """Do file operations on rank 0: see `together`.

    Collective: every rank of the group calls this.
    """
    together(lambda: act() if group.rank == 0 else None, failure, group)


def together(act: Callable[[], T], failure: str, group: Group) -> T:
    """Do file operations on every rank; if they fail on one, raise its error on all.

    Collective: every rank of the group calls this.

    Raises
    ------
    InputError
        That of `act`, or one with the text `failure` and the reason of an OSError.
    """
    result, error = None, None
    try:
        result = act()
    except InputError as problem:
        error = problem
    except OSError as problem:
        error = InputError(f"{failure}: {problem.strerror or problem}")
    raise_together(error, group)
    return cast(T, result)
