"""How blocks move: every rank hands what it holds to the right and takes over from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops it has been everywhere

A `Rotation` is one kind of block going round: queries, or the results that follow them.  It has two
buffers: while one is on its way to the right, the next block comes from the left into the other,
and gloo's threads, or NCCL's stream, move both while the rank computes.  With NCCL the program
never waits here: it only tells the device's stream to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lvxattn.reference.meter import Meter
from lvxattn.torch_impl.group import Group, over_cpu
from lvxattn.torch_impl.layout import Layout

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# Shape and dtype of one tensor of a block, and those of a block by its owner.
Field = tuple[tuple[int, ...], torch.dtype]
Fields = Callable[[int], list[Field]]

# One tag for each kind of block: two rotations are under way at once.
BLOCKS, RESULTS = 7001, 7002
# What they carry, by schedule.
_KINDS = {
    ("lv-xattn", BLOCKS): "the queries of rank {}",
    ("lv-xattn", RESULTS): "the results for rank {}'s queries",
    ("ring", BLOCKS): "the keys and values of rank {}",
    ("ring", RESULTS): "the gradients of rank {}'s keys and values",
}


class Exchange:
    """One rank's traffic in one pass.

    Parameters
    ----------
    group : Group
    layout : Layout
    meter : Meter
        Counts what this rank sends.
    device : torch.device
        Where the rank computes.
    """

    def __init__(self, group: Group, layout: Layout, meter: Meter, device: torch.device) -> None:
        self.group, self.layout, self.meter, self.device = group, layout, meter, device
        # gloo takes tensors of the host only: blocks of a GPU are then copied there and back.
        self.staged = device.type != "cpu" and over_cpu(group, device)
        self.rotations: list[Rotation] = []

    def rotation(self, tag: int, fields: Fields, hop: int = 0) -> "Rotation":
        """Return the rotation of one kind of block.

        Parameters
        ----------
        tag : int
        fields : callable
            The shapes and dtypes of a block, by its owner: it is known how much will come.
        hop : int
            At which hop the first shift happens.
        """
        rotation = Rotation(self, tag, fields, hop)
        self.rotations.append(rotation)
        return rotation

    def computes(self, fn: Callable[Arguments, Result]) -> Callable[..., Result]:
        """Return `fn` with a hop as an argument before its own, for meter and profiler."""
        timed = self.meter.computes(fn)

        def computing(hop: int, *args: Any, **kwargs: Any) -> Result:
            what = _KINDS[self.layout.schedule, BLOCKS].format(self.layout.owner(hop))
            with span(f"{self.layout.schedule}: hop {hop}, compute with {what}", self.device):
                return timed(*args, **kwargs)

        return computing

    def finish(self) -> None:
        """Wait until what this rank has sent is gone, so that its buffers are free again."""
        for rotation in self.rotations:
            rotation.wait_sent()
            for buffer in rotation.buffers:
                self.layout.pool.give(buffer)
        # They point back here: a circle would keep all buffers until Python looks for circles.
        self.rotations.clear()


class Rotation:
    """One kind of block going round the ring.

    Attributes
    ----------
    nbytes : int
        The size of the largest block.
    """

    def __init__(self, exchange: Exchange, tag: int, fields: Fields, hop: int) -> None:
        self.exchange, self.tag, self.fields, self.hop = exchange, tag, fields, hop
        layout, staged = exchange.layout, exchange.staged
        self.nbytes = max(self._nbytes(owner) for owner in range(layout.size))
        device = torch.device("cpu") if staged else exchange.device
        # In hand, and to be received into; a rank that is alone needs neither.
        count = 2 if layout.size > 1 else 0
        self.buffers = [layout.pool.take(self.nbytes, device, pinned=staged) for _ in range(count)]
        self.sending: list[dist.Work] = []
        self.receiving: list[dist.Work] = []

    def shift(self, *tensors: Tensor) -> None:
        """Send a block to the right and start to receive the next one from the left.

        What is sent is `tensors` or, without them, the block that was received last.  The block
        that was received before that one is overwritten from now on.
        """
        layout = self.exchange.layout
        in_hand, free = self.buffers
        mine = self._nbytes(layout.owner(self.hop))
        coming = self._nbytes(layout.owner(self.hop + 1))
        if tensors:
            for view, x in zip(self._views(), tensors, strict=True):
                view.copy_(x)  # in place: what was received there has been used
        # The block sent last left from `free`: until it is gone nothing may be received there.
        self.wait_sent()
        with span(f"{layout.schedule}: hop {self.hop + 1}, post {self._kind()}", self.device):
            self._post(in_hand[:mine], free[:coming])
        self.exchange.meter.sent(mine)
        self.buffers = [free, in_hand]
        self.hop += 1

    def wait(self) -> list[Tensor]:
        """Wait for the block that `shift` asked for, and return its tensors.

        They are views of a buffer, good until the next but one call of `shift`.
        """
        layout = self.exchange.layout
        what = self._kind()
        with span(f"{layout.schedule}: hop {self.hop}, wait for {what}", self.device):
            self._wait_for(self.receiving, self._coming)
        # Staged, the copy has to be done before the next block may come into the same memory.
        return [x.to(self.device) for x in self._views()]

    def wait_sent(self) -> None:
        """Wait until the block that was sent last is gone."""
        self._wait_for(self.sending, self._leaving)

    @property
    def device(self) -> torch.device:
        """Where the rank computes."""
        return self.exchange.device

    def _post(self, block: Tensor, room: Tensor) -> None:
        group, layout = self.exchange.group.group, self.exchange.layout
        # Both in one batch: NCCL would otherwise wait for the one before it starts the other.
        # Empty blocks have nothing to wait for, and both ends know it.
        ends = (dist.isend, block, layout.right), (dist.irecv, room, layout.left)
        works = {
            op: dist.P2POp(op, x, group=group, group_peer=peer, tag=self.tag)
            for op, x, peer in ends
            if x.numel()
        }
        if not works:
            self.sending, self.receiving = [], []
            return
        # What has ended a neighbour may show here first, and not by which of the two.
        with self.exchange.group.waiting(lambda: f"{self._coming(1)}, or {self._leaving(1)}"):
            requests = dist.batch_isend_irecv(list(works.values()))
        if len(requests) < len(works):  # NCCL gives one for the batch
            self.sending = self.receiving = requests
        else:
            by_op = dict(zip(works, requests, strict=True))
            self.sending = [r for op, r in by_op.items() if op is dist.isend]
            self.receiving = [r for op, r in by_op.items() if op is dist.irecv]

    def _wait_for(self, works: list[dist.Work], what: Callable[[], str]) -> None:
        with self.exchange.group.waiting(what):
            for work in works:
                self.exchange.meter.waits(work.wait)()
        works.clear()

    def _coming(self, ahead: int = 0) -> str:
        """Say what comes from the left."""
        left = self.exchange.layout.left
        return f"{self._kind(ahead)} at hop {self.hop + ahead}, from rank {left}"

    def _leaving(self, ahead: int = 0) -> str:
        """Say what is sent to the right."""
        right = self.exchange.layout.right
        return f"rank {right} to take {self._kind(ahead - 1)} at hop {self.hop + ahead}"

    def _kind(self, ahead: int = 0) -> str:
        layout = self.exchange.layout
        return _KINDS[layout.schedule, self.tag].format(layout.owner(self.hop + ahead))

    def _views(self) -> list[Tensor]:
        return cut(self.buffers[0], self.fields(self.exchange.layout.owner(self.hop)))

    def _nbytes(self, owner: int) -> int:
        return nbytes(self.fields(owner))


def cut(buffer: Tensor, fields: list[Field]) -> list[Tensor]:
    """Return the tensors of a block that lies in a buffer of bytes, as views."""
    views: dict[int, Tensor] = {}
    start = 0
    # Wide dtypes first, so that every tensor is aligned without gaps.
    for i in sorted(range(len(fields)), key=lambda i: -fields[i][1].itemsize):
        shape, dtype = fields[i]
        stop = start + prod(shape) * dtype.itemsize
        views[i] = buffer[start:stop].view(dtype).view(shape)
        start = stop
    return [views[i] for i in range(len(fields))]


def nbytes(fields: list[Field]) -> int:
    """Return how many bytes a block has."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in fields)


@contextmanager
def span(name: str, device: torch.device) -> Iterator[None]:
    """Open a named range in PyTorch's profiler and, on CUDA, in Nsight's."""
    nvtx = torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
