"""The processes started by torchrun.

The channel is a store of its own, held by rank 0: it answers even if a process group is stuck.
"""

import gc
import os
import pickle
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from lvxattn.check.ranks.processes import JUDGING, Processes, SilentError
from lvxattn.check.sweep import ASCENDING, GROUPS
from lvxattn.common.launcher import number_in

# Older versions always sort the ranks of a group.
_ORDERED = "sort_ranks" in signature(dist.new_group).parameters
_PIECE = 2**22  # bytes of a message that are stored at once: a store takes at most 8 MiB


class TorchProcesses(Processes):
    """The ranks of torch.distributed's world; the function gets groups of them."""

    groups: tuple[str, ...] = GROUPS if _ORDERED else ASCENDING

    def __init__(self, time_limit: float, device: str | None) -> None:
        self._ours = not dist.is_initialized()
        self.device = _own_device(device)
        if self._ours:
            init_process_group(self.device)
        rank, size = dist.get_rank(), dist.get_world_size()
        host, port = os.environ["MASTER_ADDR"], 0
        wait = timedelta(seconds=JUDGING)
        if rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            port = self._store.port
        ports = [port]
        dist.broadcast_object_list(ports, src=0)
        if rank:
            self._store = TCPStore(host, ports[0], is_master=False, timeout=wait)
        self._sent: Counter[tuple[int, int]] = Counter()
        self._taken: Counter[tuple[int, int]] = Counter()
        super().__init__(rank, size, time_limit)

    def close(self) -> None:
        """Destroy the process group too, if this object made it."""
        super().close()
        # A group that an error's frames or a circle of references hold keeps gloo's threads, which
        # may abort the process when Python exits.
        self._error = None
        gc.collect()
        dist.barrier()  # rank 0 holds the store: no rank may still need it
        if self._ours:
            dist.destroy_process_group()

    def _inside(self) -> AbstractContextManager[Any]:
        if self.device is None or torch.device(self.device).type != "cuda":
            return nullcontext()
        return torch.cuda.device(torch.device(self.device))  # a thread starts on device 0

    def _send(self, message: Any, dest: int, tag: int) -> None:
        key = f"{self.rank}>{dest}/{tag}/{self._sent[dest, tag]}"
        self._sent[dest, tag] += 1
        data = pickle.dumps(message)
        starts = range(0, len(data), _PIECE)
        for number, start in enumerate(starts):
            self._store.set(f"{key}/{number}", data[start : start + _PIECE])  # type: ignore[arg-type]
        self._store.set(key, str(len(starts)))  # the last: it is what `_arrived` looks for

    def _arrived(self, source: int, tag: int) -> bool:
        try:
            return self._store.check([self._next(source, tag)])
        except dist.DistError as error:  # rank 0, which holds the store, has ended
            raise SilentError(f"rank 0 has ended: {error}") from None

    def _take(self, source: int, tag: int) -> Any:
        key = self._next(source, tag)
        self._taken[source, tag] += 1
        pieces = [f"{key}/{number}" for number in range(int(self._store.get(key)))]
        data = b"".join(map(self._store.get, pieces))
        for name in (key, *pieces):
            self._store.delete_key(name)
        return pickle.loads(data)  # from a rank of ours

    def _next(self, source: int, tag: int) -> str:
        return f"{source}>{self.rank}/{tag}/{self._taken[source, tag]}"

    def _split(self, group: tuple[int, ...]) -> Any:
        options: dict[str, Any] = {"sort_ranks": False} if _ORDERED else {}
        return dist.new_group(list(group), **options)

    def _free(self, comm: Any) -> None:
        if comm != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(comm)

    def _abort(self) -> None:
        """Wait for other ranks' output: torchrun ends all when one ends with status 1."""
        time.sleep(0.5)


def _own_device(device: str | None) -> str | None:
    """Return this rank's device: one GPU for each rank if the device has no number."""
    if device is None or torch.device(device).type != "cuda" or ":" in device:
        return device
    local = number_in(os.environ, "LOCAL_RANK") or 0
    return f"cuda:{local % max(1, torch.cuda.device_count())}"


def init_process_group(device: str | None) -> None:
    """Initialize with NCCL for CUDA tensors if each rank of this host has its own GPU."""
    own = torch.cuda.device_count() >= (number_in(os.environ, "LOCAL_WORLD_SIZE") or 1)
    cuda = (device or "").startswith("cuda") and own  # an invalid device is reported later
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
