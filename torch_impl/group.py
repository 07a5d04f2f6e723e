"""The ranks that attend together: a process group, by the names that the shared checks use.

Whoever takes a `group` takes a process group, a one-dimensional DeviceMesh or None.  None is the
world, or this process alone where torch.distributed was not initialised.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lvxattn.common.validation import instead_of

T = TypeVar("T")

# What a public function's `group` may be.
AnyGroup = Any  # dist.ProcessGroup | DeviceMesh | Group | None; mypy sees ProcessGroup as Any


class Group:
    """A process group as the ring sees it.

    It does not keep the process group alive: an autograd graph that did so until Python ends would
    leave gloo's threads running into that end, and one of them might abort the process.

    Attributes
    ----------
    rank, size : int
        This rank's number within the group, and how many ranks there are.
    """

    def __init__(self, group: Any) -> None:
        self._group = None if group is None else weakref.ref(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        """Return the same ranks: a copy of a module attends over them, too."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled, as a process group does."""
        raise TypeError(
            "group: a process group cannot be pickled; save the state_dict, or set the module's "
            "group to None before"
        )

    @property
    def group(self) -> Any:
        """The process group, or None: this process alone.

        Raises
        ------
        RuntimeError
            It has been destroyed.
        """
        group = None if self._group is None else self._group()
        if group is None and self._group is not None:
            raise RuntimeError(f"group: it has been destroyed (on {self.name})")
        return group

    @staticmethod
    def of(group: AnyGroup) -> "Group":
        """Return the ranks that `group` stands for.  Not collective.

        Raises
        ------
        TypeError, ValueError
            At once and on this rank: nobody can be asked over such a group.
        """
        if isinstance(group, Group):
            return group
        if group is None:
            if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
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

    @property
    def name(self) -> str:
        """Return how messages name this rank."""
        return f"rank {self.rank} of {self.size}"

    def allgather(self, sendobj: T) -> list[T]:
        """Give every rank the objects of all ranks, in rank order.

        Collective: every rank of the group calls this.
        """
        if self.size == 1:
            return [sendobj]
        gathered: list[Any] = [None] * self.size
        with self.waiting(lambda: "what all ranks have to say"):
            dist.all_gather_object(gathered, sendobj, self.group)
        return gathered

    @contextmanager
    def waiting(self, what: Callable[[], object]) -> Iterator[None]:
        """Say what was waited for, should the group's timeout end the wait, or another rank."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"{self.name} waited for {what()}, in vain: {error}") from error

    @contextmanager
    def named(self) -> Iterator[None]:
        """Add a note of this rank to whatever is raised: it will end the others too."""
        try:
            yield
        except BaseException as error:
            error.add_note(f"raised on {self.name}")
            raise


def over_cpu(group: Group, device: torch.device) -> bool:
    """Return whether tensors of this device travel through the host's memory; meta ones do not.

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
