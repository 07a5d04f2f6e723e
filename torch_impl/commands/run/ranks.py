"""The ranks of a run: a process group, by the names that the shared program uses."""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist

from lvxattn.torch_impl.commands.run.backend import Backend
from lvxattn.torch_impl.commands.run.processes import choose_device, limit_threads
from lvxattn.torch_impl.group import Group

T = TypeVar("T")


class TorchRanks:
    """The ranks of a process group, seen from one of them; `lvxattn.cli.run_ranks.Ranks`.

    Attributes
    ----------
    group : Group
    rank, size : int
    launched : bool
        torchrun hands on its own stdout: a terminal is one.
    """

    launched = False

    def __init__(self, group: Group) -> None:
        self.group, self.rank, self.size = group, group.rank, group.size

    def allgather(self, sendobj: T) -> list[T]:
        """Give every rank the objects of all ranks.  Collective: every rank calls this."""
        return self.group.allgather(sendobj)

    def limit_threads(self) -> int:
        """Share out the cores.  Collective: every rank calls this."""
        return limit_threads(self.group)

    def backend(self, wish: str, dtype: str) -> Backend:  # noqa: ARG002 - PyTorch has every dtype
        """Choose a device.  Collective: every rank calls this."""
        return Backend(*choose_device(wish, self.group))

    def start_together(self) -> None:
        """Wait for all ranks.  Collective: every rank calls this."""
        if self.size > 1:
            with self.group.waiting(lambda: "all ranks to start"):
                dist.barrier(self.group.group)

    def send(self, number: float, dest: int) -> None:
        """Send a number to a rank that calls `receive`."""
        with self.group.waiting(lambda: f"rank {dest} to take a number"):
            x = torch.tensor([number], dtype=torch.float64)
            dist.send(x, group=self.group.group, group_dst=dest)

    def receive(self, source: int) -> float:
        """Wait for a number from a rank that calls `send`."""
        with self.group.waiting(lambda: f"a number from rank {source}"):
            x = torch.empty(1, dtype=torch.float64)
            dist.recv(x, group=self.group.group, group_src=source)
        return float(x)

    def watching(self, what: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Do nothing: the group's timeout watches."""
        return nullcontext()
