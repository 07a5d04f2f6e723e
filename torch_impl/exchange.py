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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lvxattn.common.exchange_base import BufferedRotation, ExchangeBase, Leg
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
    wanted : str
        The arguments whose gradients this rank wants of a backward.
    """

    layout: Layout  # torch_impl's, which numbers forwards

    def __init__(
        self,
        group: Group,
        layout: Layout,
        q: Array,
        mask: Any = None,
        meter: Meter | None = None,
        wanted: str = "qkv",
    ) -> None:
        super().__init__(layout, mask, meter, wanted)
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
        self.rotations: list[Rotation]

    def rotation(self, kind: Kind) -> "Rotation":
        """Return the rotation of one kind of block."""
        rotation = Rotation(self, kind)
        self.rotations.append(rotation)
        return rotation

    def buffer(self, nbytes: int) -> Array:
        """Return at least so many bytes for messages, until `finish`."""
        device = torch.device("cpu") if self.staged else self.device

        def make(nbytes: int) -> Array:
            # A buffer made in inference mode could not be written to outside of it.
            with torch.inference_mode(mode=False):
                return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=self.staged)

        buffer: Array = self.take((device, self.staged), nbytes, make)
        return buffer

    def accumulators(self, *arrays: Array) -> list[Array]:
        """Return zeros in the shapes of keys, for their gradients; of no keys if not wanted."""
        if "k" not in self.wanted:
            arrays = tuple(x[:, :, :0] for x in arrays)
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
            for held in rotation.buffers:
                rotation.wait_sent(held)
        self.give_back()


class _Held:
    """A buffer for one block, and the requests that send from it or receive into it."""

    def __init__(self, buffer: Array) -> None:
        self.bytes = buffer
        self.works: list[dist.Work] = []


class Rotation(BufferedRotation):
    """One kind of block travelling round the ring.

    Attributes
    ----------
    room : int
        The size of the largest block, with its stamp.
    """

    layout: Layout
    exchange: Exchange

    def __init__(self, exchange: Exchange, kind: Kind) -> None:
        super().__init__(exchange, kind)
        self.stamp_nbytes = 0 if exchange.stamp is None else exchange.stamp.numel()
        largest = max(kind.nbytes(exchange.layout, owner) for owner in range(exchange.P))
        self.room = largest + self.stamp_nbytes
        for _ in range(2 if self.due else 0):
            self._allocate()

    def _load(self, held: _Held, leg: Leg, arrays: Sequence[Array]) -> None:
        for view, x in zip(self._views(held, leg), arrays, strict=True):
            view.copy_(x if leg.whole else x[:, :, leg.rows])
        if self.exchange.stamp is not None:
            end = self._nbytes(leg)
            held.bytes[end - self.stamp_nbytes : end] = self.exchange.stamp
        self.loaded[leg.start] = held

    def receive(self, hop: int) -> list[Array]:
        """Wait for the block that comes at a hop, and return its tensors.

        They are views of a buffer, valid until the next block is received and sent on; copies where
        rows did not travel, as they see nothing here, which are filled in.
        """
        leg = self.comes[hop]
        held = self.receiving[hop]
        what = self.awaited(leg)
        with span(f"{self.layout.way}: hop {hop}, wait for {what.name}", self.exchange.device):
            self._wait_for(held, lambda: what)
        del self.receiving[hop]
        nbytes = self._nbytes(leg)
        self.exchange.check_stamp(held.bytes[nbytes - self.stamp_nbytes : nbytes], what)
        self.here = held
        # A staged copy must be complete before the next block may overwrite the host memory.
        rows = [x.to(self.exchange.device) for x in self._views(held, leg)]
        self.arrays = self.filled_in(rows, leg, lambda shape, value, x: x.new_full(shape, value))
        return self.arrays

    def start(self, stop: int, legs: list[Leg]) -> None:
        """Start the transfers that end at a stop: of one block that comes, and of those leaving."""
        group, tag = self.exchange.group.group, self.kind.tag
        ends: list[tuple[Callable[..., Any], _Held, Leg, int]] = []
        what: list[Block] = []
        if (coming := self.comes.get(stop)) is not None:
            held = self.receiving[stop] = self._free()
            ends.append((dist.irecv, held, coming, self.source(coming)))
            what.append(self.awaited(coming))
        for leg in legs:
            held = self.loaded.pop(leg.start)
            self.sending[held] = leg
            ends.append((dist.isend, held, leg, self.dest(leg)))
            what.append(self.leaving(leg))
            self.exchange.meter.sent(self._nbytes(leg), self.dest(leg), partial(self.leaving, leg))
        # Empty blocks are not sent, as both ends know.
        ends = [end for end in ends if self._nbytes(end[2])]
        if not ends:
            return
        leaving = [block.name for block in what if block.dest is not None]
        name = f"{self.layout.way}: hop {stop}, post {', '.join(leaving) or 'a receive'}"
        # The failure of a neighbour may show here first, without telling which it is.
        failing = partial(", or ".join, map(str, what))
        with span(name, self.exchange.device), self.exchange.group.waiting(failing):
            # One batch: NCCL would otherwise finish the one before it starts the other.
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(
                        op, held.bytes[: self._nbytes(leg)], group=group, group_peer=peer, tag=tag
                    )
                    for op, held, leg, peer in ends
                ]
            )
        for n, (_, held, _, _) in enumerate(ends):
            # NCCL returns one for the batch.
            held.works = [works[n]] if len(works) == len(ends) else list(works)

    def wait_sent(self, held: _Held) -> None:
        """Wait until the last send from a buffer is complete."""
        if held in self.sending:
            leg = self.sending.pop(held)
            self._wait_for(held, lambda: self.leaving(leg))

    def _allocate(self) -> _Held:
        self.buffers.append(_Held(self.exchange.buffer(self.room)))
        return self.buffers[-1]

    def _wait_for(self, held: _Held, what: Callable[[], Block]) -> None:
        with self.exchange.group.waiting(what), self.exchange.meter.waits(what):
            for work in held.works:
                work.wait()
        held.works = []

    def _views(self, held: _Held, leg: Leg) -> list[Array]:
        return cut(held.bytes, self.fields(leg), self.exchange.dtype_of)

    def _nbytes(self, leg: Leg) -> int:
        return self.nbytes(leg) + self.stamp_nbytes


@contextmanager
def span(name: str, device: torch.device) -> Iterator[None]:
    """Open a named range in PyTorch's profiler and, on CUDA, in Nsight's."""
    nvtx = torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
