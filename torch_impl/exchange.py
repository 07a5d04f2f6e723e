"""How blocks move: every rank hands what it holds to the right and takes over from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops it has been everywhere

A `Rotation` is one kind of block going round: queries, or the results that follow them.  It has two
buffers: while one is on its way to the right, the next block comes from the left into the other,
and gloo's threads, or NCCL's stream, move both while the rank computes.  With NCCL the program
never waits here: it only tells the device's stream to.

What a backward sends through the host's memory says which forward it belongs to, in 8 bytes at the
end of every message: backwards in another order on some ranks would otherwise take one another's
blocks, of the same shape, and return wrong gradients.  With NCCL nobody could read them without
waiting for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lvxattn.common.meter import Block, Meter
from lvxattn.common.passes import Pass, Round
from lvxattn.common.wire import NAMES, Kind

from .group import Group, over_cpu
from .layout import Forwards, Layout
from .merge import Array


class Field(NamedTuple):
    """Shape and dtype of one tensor of a block."""

    shape: tuple[int, ...]
    dtype: torch.dtype


# Those of a block by its owner.
Fields = Callable[[int], list[Field]]


class Exchange(Pass):
    """One rank's traffic and work in one pass: made by the front door, given to a schedule.

    Parameters
    ----------
    group : Group
    layout : Layout
    q : Tensor
        Tells the device.
    mask : None, Tensor or callable
        This rank's.
    meter : Meter, optional
        Counts what this rank sends.
    """

    layout: Layout  # torch_impl's, which has a pool

    def __init__(
        self,
        group: Group,
        layout: Layout,
        q: Array,
        mask: Any = None,
        meter: Meter | None = None,
    ) -> None:
        super().__init__(layout, mask, meter)
        self.group = group
        self.device, self.wide = q.device, getattr(torch, layout.accumulator)
        # gloo takes tensors of the host only: blocks of a GPU are then copied there and back.
        over_host = over_cpu(group, q.device)
        self.staged = q.device.type != "cpu" and over_host
        self.stamp: Array | None = None
        if layout.forward is not None and layout.stamp_nbytes and over_host:
            number = layout.forward.to_bytes(layout.stamp_nbytes, "little")
            self.stamp = torch.tensor(list(number), dtype=torch.uint8, device="cpu")
        self.rotations: list[Rotation] = []

    def rotation(self, kind: Kind, start: int = 0) -> "Rotation":
        """Return the rotation of one kind of block, which begins at hop `start`."""
        rotation = Rotation(self, kind, start)
        self.rotations.append(rotation)
        return rotation

    @contextmanager
    def computing(self, hop: int = 0, what: str = "") -> Iterator[None]:
        """Measure work on the block that is here at a hop, or on `what`, for the profiler too."""
        block = Block(what or NAMES[self.layout.schedule][0], self.layout.owner(hop), hop)
        name = f"{self.layout.way}: hop {hop}, compute with {block.name}"
        with span(name, self.device), self.meter.computes(lambda: block):
            yield

    def check_stamp(self, stamp: Array, block: Block) -> None:
        """Refuse a block of another forward than the one whose backward this is.

        Raises
        ------
        RuntimeError
            On this rank; the others end as after any exception.
        """
        if self.stamp is None or torch.equal(stamp, self.stamp):
            return
        mine, its = (
            Forwards.name(int.from_bytes(x.tolist(), "little")) for x in (self.stamp, stamp)
        )
        raise RuntimeError(
            f"{self.group.name} met, in the backward of {mine}, {block}, of {its}: call the "
            "backwards of several forwards in one order on all ranks, or one for the sum of "
            "their losses"
        )

    def finish(self) -> None:
        """Wait until what this rank has sent is gone, so that its buffers are free again."""
        for rotation in self.rotations:
            rotation.wait_sent()
            for buffer in rotation.buffers:
                self.layout.pool.give(buffer)
        # They point back here: a circle would keep all buffers until Python looks for circles.
        self.rotations.clear()


class Rotation(Round):
    """One kind of block going round the ring.

    Attributes
    ----------
    nbytes : int
        The size of the largest block, without its stamp.
    """

    layout: Layout

    def __init__(self, exchange: Exchange, kind: Kind, hop: int) -> None:
        super().__init__(exchange.layout, kind, hop)
        self.exchange = exchange
        layout, staged = exchange.layout, exchange.staged
        self.nbytes = max(self._nbytes(owner) for owner in range(layout.size))
        device = torch.device("cpu") if staged else exchange.device
        # In hand, and to be received into; a rank that is alone needs neither.
        count = 2 if layout.size > 1 else 0
        self.stamp_nbytes = 0 if exchange.stamp is None else exchange.stamp.numel()
        room = self.nbytes + self.stamp_nbytes
        self.buffers = [layout.pool.take(room, device, pinned=staged) for _ in range(count)]
        self.sending: list[dist.Work] = []
        self.receiving: list[dist.Work] = []

    def send(self, *arrays: Array) -> None:
        """Send tensors to the right, and begin to receive the next block from the left."""
        if self.exchange.P > 1:
            for view, x in zip(self._views(), arrays, strict=True):
                view.copy_(x)  # in place: what was received there has been used
            if self.exchange.stamp is not None:
                end = self._nbytes(self.layout.owner(self.hop))
                self.buffers[0][end : end + self.stamp_nbytes] = self.exchange.stamp
            self.forward()

    def forward(self) -> None:
        """Send on the block that was received last, and begin to receive the next one.

        The block that was received before it is overwritten from now on.
        """
        layout = self.layout
        in_hand, free = self.buffers
        mine = self._nbytes(layout.owner(self.hop)) + self.stamp_nbytes
        coming = self._nbytes(layout.owner(self.hop + 1)) + self.stamp_nbytes
        # The block sent last left from `free`: until it is gone nothing may be received there.
        self.wait_sent()
        self.hop += 1
        self.exchange.meter.sent(mine, layout.right, self.leaving)
        what = self.leaving().name
        with span(f"{layout.way}: hop {self.hop}, post {what}", self.device):
            self._post(in_hand[:mine], free[:coming])
        self.buffers = [free, in_hand]

    def receive(self) -> list[Array]:
        """Wait for the next block, and return its tensors.

        They are views of a buffer, good until the next but one block is sent.
        """
        layout = self.layout
        what = self.awaited().name
        with span(f"{layout.way}: hop {self.hop}, wait for {what}", self.device):
            self._wait_for(self.receiving, self.awaited)
        end = self._nbytes(layout.owner(self.hop))
        self.exchange.check_stamp(self.buffers[0][end : end + self.stamp_nbytes], self.awaited())
        # Staged, the copy has to be done before the next block may come into the same memory.
        return [x.to(self.device) for x in self._views()]

    def wait_sent(self) -> None:
        """Wait until the block that was sent last is gone."""
        self._wait_for(self.sending, self.leaving)

    @property
    def device(self) -> torch.device:
        """Where the rank computes."""
        return self.exchange.device

    def _post(self, block: Array, room: Array) -> None:
        group, layout = self.exchange.group.group, self.layout
        # Both in one batch: NCCL would otherwise wait for the one before it starts the other.
        # Empty blocks have nothing to wait for, and both ends know it.
        ends = (dist.isend, block, layout.right), (dist.irecv, room, layout.left)
        works = {
            op: dist.P2POp(op, x, group=group, group_peer=peer, tag=self.kind.tag)
            for op, x, peer in ends
            if x.numel()
        }
        if not works:
            self.sending, self.receiving = [], []
            return
        # What has ended a neighbour may show here first, and not by which of the two.
        with self.exchange.group.waiting(lambda: f"{self.awaited()}, or {self.leaving()}"):
            requests = dist.batch_isend_irecv(list(works.values()))
        if len(requests) < len(works):  # NCCL gives one for the batch
            self.sending = self.receiving = requests
        else:
            by_op = dict(zip(works, requests, strict=True))
            self.sending = [r for op, r in by_op.items() if op is dist.isend]
            self.receiving = [r for op, r in by_op.items() if op is dist.irecv]

    def _wait_for(self, works: list[dist.Work], what: Callable[[], Block]) -> None:
        with self.exchange.group.waiting(what), self.exchange.meter.waits(what):
            for work in works:
                work.wait()
        works.clear()

    def _views(self) -> list[Array]:
        layout = self.layout
        fields = self.kind.fields(layout, layout.owner(self.hop))
        return cut(self.buffers[0], [Field(x.shape, getattr(torch, x.dtype)) for x in fields])

    def _nbytes(self, owner: int) -> int:
        return self.kind.nbytes(self.layout, owner)


def cut(buffer: Array, fields: list[Field]) -> list[Array]:
    """Return the tensors of a block that lies in a buffer of bytes, as views."""
    views: dict[int, Array] = {}
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
