"""Process groups, with the attributes of a communicator that the shared checks use.

A `group` argument is a process group, a one-dimensional DeviceMesh or None.  None is the world, or
this process alone where torch.distributed is not initialised.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lvxattn.common.launcher import number_in
from lvxattn.common.meter import with_hosts
from lvxattn.common.processes import stopped
from lvxattn.common.validation import instead_of

if not dist.is_initialized():
    # The default group of that moment is a default of its functions.  Imported later, as optimizers
    # do, it would keep that group alive until Python exits, when gloo's threads may abort the
    # process.
    import torch.distributed.nn.functional

T = TypeVar("T")

# Names in compiled programs of groups that have none: the default group, and this process alone.
WORLD, ALONE = "", "alone"
# The type of the `group` argument of public functions.
_NOTICED = "noticed on"  # how the note begins of an error that another rank may have caused
AnyGroup = Any  # dist.ProcessGroup | DeviceMesh | Group | None; mypy sees ProcessGroup as Any


class Group:
    """The ranks of a process group.

    Holds a weak reference to it: if an autograd graph kept the process group alive until the
    interpreter exits, gloo's threads could abort the process then.

    Attributes
    ----------
    rank, size : int
        The number of this rank within the group, and the number of ranks.
    hosts : sequence of str
        By rank, once known, for error messages.
    group_name : str
        The name by which a compiled program finds the group.
    """

    def __init__(self, group: Any) -> None:
        self._group = None if group is None else weakref.ref(group)
        self.group_name: str = ALONE if group is None else group.group_name
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.hosts: Sequence[str] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        """Return the same object: a copy of a module uses the same ranks."""
        return self

    def __reduce__(self) -> Any:
        """Raise a TypeError: process groups cannot be pickled."""
        raise TypeError(
            "group: a process group cannot be pickled; save the state_dict, or set the module's "
            "group to None before"
        )

    @property
    def group(self) -> Any:
        """The process group, or None for this process alone.

        Raises
        ------
        RuntimeError
            The process group has been destroyed.
        """
        group = None if self._group is None else self._group()
        if group is None and self._group is not None:
            raise RuntimeError(f"group: it has been destroyed (on {self.name})")
        return group

    @staticmethod
    def of(group: AnyGroup) -> "Group":
        """Return the ranks of a `group` argument.  Not collective.

        Raises
        ------
        TypeError, ValueError
            On this rank only: no other rank can be reached over such a group.
        """
        if isinstance(group, Group):
            return group
        if group is None:
            if not dist.is_initialized() and (number_in(os.environ, "WORLD_SIZE") or 1) > 1:
                warnings.warn(
                    f"group: {os.environ['WORLD_SIZE']} processes were started, and each attends "
                    "alone until torch.distributed.init_process_group is called",
                    stacklevel=3,
                )
            return Group(dist.group.WORLD if dist.is_initialized() else None)
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    "group: expected a mesh of one dimension, as mesh['context'] gives it, "
                    f"got {group.ndim} dimensions {group.mesh_dim_names or tuple(group.shape)}"
                )
            if group.get_coordinate() is None:
                raise ValueError(f"group: this process is not in the mesh {group}")
            return Group(group.get_group())
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this process is not in it (new_group gave it no member)")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group: expected a ProcessGroup, a one-dimensional DeviceMesh or None, "
                f"got {instead_of(group)}"
            )
        if dist.get_rank(group) < 0:
            raise ValueError(f"group: rank {dist.get_rank()} of the world is not in it")
        return Group(group)

    @staticmethod
    def in_program(group: AnyGroup) -> tuple[str, int]:
        """Return the name and the number of ranks of a group, for `of_program`.

        A compiler can look into it, and only that is done that a compiler can.
        """
        if isinstance(group, Group):
            return group.group_name, group.size
        if group is None:
            return WORLD, dist.get_world_size() if dist.is_initialized() else 1
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group: expected a one-dimensional DeviceMesh, got {group.ndim} dimensions"
                )
            group = group.get_group()
        if isinstance(group, int):  # GroupMember.NON_GROUP_MEMBER
            raise ValueError("group: expected one that this rank is in")
        return group.group_name, group.size()

    @staticmethod
    def of_program(name: str, ranks: int) -> "Group":
        """Return the group of a compiled program.  Not collective.

        Raises
        ------
        ValueError, RuntimeError
            On this rank only: there is no such group, or it has other ranks.
        """
        if name in (WORLD, ALONE):
            group = Group.of(None) if name == WORLD else Group(None)
        else:
            group = Group.of(dist.distributed_c10d._resolve_process_group(name))  # type: ignore
        if group.size != ranks:
            raise ValueError(
                f"group: expected {ranks} ranks, as when the program was compiled, got {group.size}"
            )
        return group

    @property
    def name(self) -> str:
        """The name of this rank in messages."""
        return f"rank {self.rank} of {self.size}"

    def allgather(self, sendobj: T) -> list[T]:
        """Return the objects of all ranks, in rank order.

        Collective: every rank of the group calls this.
        """
        if self.size == 1:
            return [sendobj]
        gathered: list[Any] = [None] * self.size
        with self.waiting(lambda: "all ranks' objects to be gathered"):
            dist.all_gather_object(gathered, sendobj, self.group)
        return gathered

    @contextmanager
    def waiting(self, what: Callable[[], object]) -> Iterator[None]:
        """Name what was waited for in an error of the group, such as a timeout or a lost rank."""
        try:
            yield
        except RuntimeError as error:
            cause = f"; {found}" if (found := stopped()) else ""
            awaited = with_hosts(what(), self.hosts)
            text = f"{self.name} failed while waiting for {awaited}{cause}: {error}"
            noticed = RuntimeError(text)
            noticed.add_note(f"{_NOTICED} {self.name}, which need not be the cause")
            raise noticed from error

    @contextmanager
    def named(self) -> Iterator[None]:
        """Add a note of this rank to any exception."""
        try:
            yield
        except BaseException as error:
            if not any(note.startswith(_NOTICED) for note in getattr(error, "__notes__", ())):
                error.add_note(f"raised on {self.name}")
            raise


def over_cpu(group: Group, device: torch.device) -> bool:
    """Return whether tensors of this device are sent through host memory.

    Raises
    ------
    ValueError
        The group has no backend for them.
    """
    if group.group is None or device.type == "meta":
        return True
    backends = backends_of(str(dist.get_backend_config(group.group)))
    if device.type not in backends and "cpu" not in backends:
        raise ValueError(
            f"group: expected one with a backend for {device.type} tensors, got {backends}"
        )
    return device.type == "cpu" or backends.get(device.type, "gloo") == "gloo"


def backends_of(config: str) -> dict[str, str]:
    """Return the backend by device of a configuration such as ``"cpu:gloo,cuda:nccl"``."""
    pairs = (part.partition(":") for part in config.split(","))
    return {device: backend for device, _, backend in pairs}
