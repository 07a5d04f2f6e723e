"""How blocks travel round a ring: every rank sends to the right and receives from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops every rank has had it

A `Rotation` is one kind of block on its way round: queries, or the results that follow them.  It
has two buffers: while one is sent to the right, the next block is received from the left into the
other, and gloo's threads, or NCCL's stream, do both while the rank computes.  With NCCL the program
never blocks here: waiting is queued on the device's stream.

In a backward every message that goes through host memory ends in 8 bytes, its stamp, which identify
the forward.  If ranks ran their backwards in different orders, they would otherwise receive one
another's blocks, of the same shape, and return wrong gradients.  With NCCL there are no stamps, as
reading them would mean waiting for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from lvxattn.common.exchange_base import ExchangeBase, RotationBase
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import NAMES, Kind, cut

from .group import Group, over_cpu
from .layout import Forwards, Layout
from .merge import Array


class Exchange(ExchangeBase):
    """One rank's communication in one forward or backward; the front door passes it to a schedule.

    From `lvxattn.common.exchange_base`: `split_keys` cuts keys, values and mask in two halves; the
    second has the extra key if their number is odd.  `mask_view(hop)` is the mask for the block
    that is here after `hop` hops, that of rank ``layout.owner(hop)``, `hop` places to the left.

    Parameters
    ----------
    group : Group
    layout : Layout
    q : Tensor
        Determines the device.
    mask : None, Tensor or callable
        Of this rank's keys.
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
        group.hosts = layout.hosts or group.hosts
        self.device, self.wide = q.device, getattr(torch, layout.accumulator)
        # gloo takes host memory only: blocks of a GPU are copied there and back.
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

    def accumulators(self, *arrays: Array) -> list[Array]:
        """Return zeros in the shapes of these arrays, to which their gradients are added."""
        return [torch.zeros(x.shape, dtype=self.wide, device=x.device) for x in arrays]

    @contextmanager
    def computing(self, hop: int = 0, what: str = "") -> Iterator[None]:
        """Measure and profile work on the block that is here at a hop, or on `what`."""
        block = Block(what or NAMES[self.layout.schedule][0], self.layout.owner(hop), hop)
        name = f"{self.layout.way}: hop {hop}, compute with {block.name}"
        with span(name, self.device), self.meter.computes(lambda: block):
            yield

    def dtype_of(self, name: str) -> torch.dtype:
        """Return a dtype by name."""
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def check_stamp(self, stamp: Array, block: Block) -> None:
        """Check that a block belongs to the forward that this backward differentiates.

        Raises
        ------
        RuntimeError
            On this rank only.
        """
        if self.stamp is None or torch.equal(stamp, self.stamp):
            return
        mine, its = (
            Forwards.name(int.from_bytes(x.tolist(), "little")) for x in (self.stamp, stamp)
        )
        raise RuntimeError(
            f"{self.group.name} received, in the backward of {mine}, {block} of {its}: call the "
            "backwards of several forwards in one order on all ranks, or one for the sum of "
            "their losses"
        )

    def finish(self) -> None:
        """Wait for pending sends, so that their buffers are free again."""
        for rotation in self.rotations:
            rotation.wait_sent()
            for buffer in rotation.buffers:
                self.layout.pool.give(buffer)
        # They refer to this exchange: a cycle would keep all buffers until garbage collection.
        self.rotations.clear()


class Rotation(RotationBase):
    """One kind of block travelling round the ring.

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
        self.nbytes = max(kind.nbytes(layout, owner) for owner in range(exchange.P))
        device = torch.device("cpu") if staged else exchange.device
        # The current block's, and the next block's; one rank needs neither.
        count = 2 if exchange.P > 1 else 0
        self.stamp_nbytes = 0 if exchange.stamp is None else exchange.stamp.numel()
        room = self.nbytes + self.stamp_nbytes
        self.buffers = [layout.pool.take(room, device, pinned=staged) for _ in range(count)]
        self.sending: list[dist.Work] = []
        self.receiving: list[dist.Work] = []

    def send(self, *arrays: Array) -> None:
        """Send tensors to the right, and start to receive from the left; nothing with one rank."""
        if self.exchange.P > 1:
            for view, x in zip(self._views(), arrays, strict=True):
                view.copy_(x)  # over the block received before, which has been used
            if self.exchange.stamp is not None:
                end = self._nbytes(self.hop)
                self.buffers[0][end : end + self.stamp_nbytes] = self.exchange.stamp
            self.pass_on()

    def pass_on(self) -> None:
        """Send the current block to the right, and start to receive the next one.

        The next one overwrites the block before the current one.
        """
        layout = self.layout
        current, free = self.buffers
        outgoing = self._nbytes(self.hop) + self.stamp_nbytes
        incoming = self._nbytes(self.hop + 1) + self.stamp_nbytes
        # The block before was sent from `free`: nothing may be received there until it has left.
        self.wait_sent()
        self.hop += 1
        self.exchange.meter.sent(outgoing, layout.right, self.leaving)
        what = self.leaving().name
        with span(f"{layout.way}: hop {self.hop}, post {what}", self.exchange.device):
            self._post(current[:outgoing], free[:incoming])
        self.buffers = [free, current]

    def receive(self) -> list[Array]:
        """Wait for the next block from the left, and return its tensors.

        They are views of a buffer, valid until the next but one block is sent.
        """
        layout = self.layout
        what = self.awaited().name
        with span(f"{layout.way}: hop {self.hop}, wait for {what}", self.exchange.device):
            self._wait_for(self.receiving, self.awaited)
        end = self._nbytes(self.hop)
        self.exchange.check_stamp(self.buffers[0][end : end + self.stamp_nbytes], self.awaited())
        # A staged copy must be complete before the next block may overwrite the host memory.
        return [x.to(self.exchange.device) for x in self._views()]

    def wait_sent(self) -> None:
        """Wait until the last send is complete."""
        self._wait_for(self.sending, self.leaving)

    def _post(self, block: Array, room: Array) -> None:
        group, layout = self.exchange.group.group, self.layout
        # One batch: NCCL would otherwise finish the one before it starts the other.  Empty blocks
        # are not sent, as both ends know.
        ends = (dist.isend, block, layout.right), (dist.irecv, room, layout.left)
        works = {
            op: dist.P2POp(op, x, group=group, group_peer=peer, tag=self.kind.tag)
            for op, x, peer in ends
            if x.numel()
        }
        if not works:
            self.sending, self.receiving = [], []
            return
        # The failure of a neighbour may show here first, without telling which of the two.
        with self.exchange.group.waiting(lambda: f"{self.awaited()}, or {self.leaving()}"):
            requests = dist.batch_isend_irecv(list(works.values()))
        if len(requests) < len(works):  # NCCL returns one for the batch
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
        fields = self.kind.fields(self.layout, self.layout.owner(self.hop))
        return cut(self.buffers[0], fields, self.exchange.dtype_of)

    def _nbytes(self, hop: int) -> int:
        return self.kind.nbytes(self.layout, self.layout.owner(hop))


@contextmanager
def span(name: str, device: torch.device) -> Iterator[None]:
    """Open a named range in PyTorch's profiler and, on CUDA, in Nsight's."""
    nvtx = torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
