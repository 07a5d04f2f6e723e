"""How blocks travel round a ring: every rank sends to the right and receives from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops every rank has had it

A `Rotation` is one kind of block on its way round: queries, or the results that follow them.  It
has two buffers: while one is sent to the right, the next block is received from the left into the
other, and both requests progress while the rank computes.  On a device a request starts once
kernels and copies have finished with its buffer (see `transport.buffers`); this is checked whenever
the rank waits or calls `progress`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.common.exchange_base import ExchangeBase, Leg, RotationBase
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import NAMES, Kind, cut

from .merge import Array
from .transport.buffers import Buffer, buffer
from .transport.device import array_module
from .transport.transfers import Transfer, Waited
from .transport.watchdog import Watchdog, wait


class Exchange(ExchangeBase):
    """One rank's communication in one forward or backward; the front door passes it to a schedule.

    From `lvxattn.common.exchange_base`: `split_keys` cuts keys, values and mask in two halves; the
    second has the extra key if their number is odd.  `mask_view(hop)` is the mask for the block
    that is here after `hop` hops, that of rank ``layout.owner(hop)``, `hop` places to the left.

    Parameters
    ----------
    comm : MPI.Intracomm
    layout : Layout
    q : array
        Determines the library, the device and the dtype.
    mask : None, array or callable
        Of this rank's keys.
    meter : Meter, optional
        Counts what this rank sends.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        layout: Layout,
        q: Array,
        mask: Any = None,
        meter: Meter | None = None,
    ) -> None:
        super().__init__(layout, mask, meter)
        self.comm = comm
        self.xp, self.dtype, self.wide = array_module(q), q.dtype, np.dtype(layout.accumulator)
        self.rotations: list[Rotation]
        self.watchdog = Watchdog.armed(comm, layout.hosts)

    def rotation(self, kind: Kind) -> "Rotation":
        """Return the rotation of one kind of block."""
        rotation = Rotation(self, kind)
        self.rotations.append(rotation)
        return rotation

    def accumulators(self, *arrays: Array) -> list[Array]:
        """Return zeros in the shapes of keys, for their gradients; of no keys if not wanted."""
        if "k" not in self.wanted:
            arrays = tuple(x[:, :, :0] for x in arrays)
        # Where only one block is added, and no other rank's, the arrays' own dtype loses nothing.
        way = self.layout.way
        once = way in ("gather", "replicated") or (self.P == 1 and way != "replicated keys")
        return [self.xp.zeros(x.shape, x.dtype if once else self.wide) for x in arrays]

    def dtype_of(self, name: str) -> Any:
        """Return a dtype by name.  NumPy knows bfloat16 only as the dtype of q."""
        return self.dtype if name == self.layout.dtype else np.dtype(name)

    @contextmanager
    def computing(self, hop: int = 0, what: str = "") -> Iterator[None]:
        """Measure the time of work on the block that is here at a hop, or on `what`."""
        block = Block(what or NAMES[self.layout.schedule][0], self.layout.owner(hop), hop)
        try:
            with self.meter.computes(lambda: block):
                yield
        except MemoryError as error:
            error.add_note(f"while computing with {block}")
            raise

    def progress(self) -> None:
        """Let MPI continue its transfers; without such calls large messages do not progress."""
        self.begin()
        MPI.Request.Testall([t.request for rotation in self.rotations for t in rotation.transfers])

    def finish(self) -> None:
        """Wait for pending sends, so that no request is left."""
        for rotation in self.rotations:
            for held in rotation.buffers:
                rotation.wait_sent(held)
                held.settle()

    def begin(self) -> None:
        """Start the requests whose buffers have become ready."""
        for rotation in self.rotations:
            for transfer in rotation.transfers:
                transfer.begin()


def _all_begun(pending: dict[Buffer, tuple[Leg, Transfer]]) -> Callable[[], bool]:
    """Return a function that returns whether the transfers that are pending now have begun."""
    before = [transfer for _, transfer in pending.values()]
    return lambda: all(transfer.begun for transfer in before)


class Rotation(RotationBase):
    """One kind of block travelling round the ring.

    Attributes
    ----------
    largest : int
        The size of the largest block, in bytes.
    buffers : list of Buffer
        The current block's and the next one's; more only where blocks that skip ranks wait for
        their turn to leave, and none on a rank that no block comes to or leaves.
    here : Buffer or None
        The buffer of the block received last.
    """

    def __init__(self, exchange: Exchange, kind: Kind) -> None:
        super().__init__(exchange.layout, kind)
        self.exchange = exchange
        sizes = [kind.nbytes(self.layout, owner) for owner in range(exchange.P)]
        self.largest = max(sizes)
        self.largest_owner = sizes.index(self.largest)
        self.buffers: list[Buffer] = []
        self.here: Buffer | None = None
        self.arrays: list[Array] = []
        self.sending: dict[Buffer, tuple[Leg, Transfer]] = {}
        self.receiving: dict[Buffer, tuple[Leg, Transfer]] = {}
        for _ in range(2 if self.due else 0):
            self._allocate()

    @property
    def transfers(self) -> list[Transfer]:
        """The pending sends and receives."""
        return [transfer for _, transfer in (*self.sending.values(), *self.receiving.values())]

    def send(self, *arrays: Array, hop: int) -> None:
        """Send the block that is here at a hop to its next stop, if it has one."""
        if (leg := self.leaves.get(hop)) is not None:
            # Over the block received, which has been used; a first stop has received none.
            held = self.here if hop in self.comes and self.here else self._free()
            self.here = None
            self._load(held, leg, arrays)
        self.exchange.post()

    def pass_on(self, hop: int) -> None:
        """Send the block received at a hop to its next stop, if it has one."""
        if (leg := self.leaves.get(hop)) is not None:
            if leg.rows == self.comes[hop].rows:
                self.loaded[hop] = self.here
            else:
                self._load(self._free(), leg, self.arrays)
        self.exchange.post()

    def _load(self, held: Buffer, leg: Leg, arrays: Sequence[Array]) -> None:
        for view, x in zip(self._views(held, leg), arrays, strict=True):
            view[...] = x if leg.whole else x[:, :, leg.rows]
        held.filled()
        self.loaded[leg.start] = held

    def receive(self, hop: int) -> list[Array]:
        """Wait for the block that comes at a hop, and return its arrays.

        They are views of a buffer, valid until the next block is received and sent on; copies where
        rows did not travel, as they see nothing here, which are filled in.
        """
        leg = self.comes[hop]
        held = next(buffer for buffer, (its, _) in self.receiving.items() if its is leg)
        self._wait_for(self.receiving, held, lambda: self.awaited(leg))
        held.deliver(self.nbytes(leg))
        self.here, self.arrays = held, self._views(held, leg)
        if not leg.whole:
            rows, self.arrays = self.arrays, []
            fields = self.kind.fields(self.layout, leg.owner)
            for x, field, fill in zip(rows, fields, self.kind.fill, strict=False):
                self.arrays.append(self.exchange.xp.full(field.shape, fill, x.dtype))
                self.arrays[-1][:, :, leg.rows] = x
        return self.arrays

    def start(self, stop: int, legs: list[Leg]) -> None:
        """Start the transfers that end at a stop: of one block that comes, and of those leaving."""
        comm, tag = self.exchange.comm, self.kind.tag
        if (coming := self.comes.get(stop)) is not None:
            free, source = self._free(), self.source(coming)
            room, empty = free.receivable(self.nbytes(coming))
            receive = Transfer(lambda: comm.Irecv([room, MPI.BYTE], source, tag), empty)
            self.receiving[free] = coming, receive
        for leg in legs:
            held = self.loaded.pop(leg.start)
            block, whole = held.sendable(self.nbytes(leg))
            self.exchange.meter.sent(self.nbytes(leg), self.dest(leg), partial(self.leaving, leg))
            # Messages of one tag must not overtake one another, whichever buffer is ready first.
            begin = partial(comm.Isend, [block, MPI.BYTE], self.dest(leg), tag)
            self.sending[held] = leg, Transfer(begin, whole, _all_begun(self.sending))

    def wait_sent(self, held: Buffer) -> None:
        """Wait until the last send from a buffer is complete."""
        if held in self.sending:
            leg, _ = self.sending[held]
            self._wait_for(self.sending, held, lambda: self.leaving(leg))

    def _free(self) -> Buffer:
        """Return a buffer that may be written to; the one whose block has left first."""
        busy = {self.here, *self.loaded.values(), *self.receiving}
        idle = [held for held in self.buffers if held not in busy] or [self._allocate()]
        held = min(idle, key=lambda held: self.sending[held][0].stop if held in self.sending else 0)
        self.wait_sent(held)
        return held

    def _allocate(self) -> Buffer:
        try:
            self.buffers.append(buffer(self.exchange.xp, self.largest))
        except Exception as error:
            error.add_note(f"for {self.kind.name.format(self.largest_owner)}, the largest block")
            raise
        return self.buffers[-1]

    def _wait_for(
        self,
        pending: dict[Buffer, tuple[Leg, Transfer]],
        held: Buffer,
        what: Callable[[], Block],
    ) -> None:
        waited = Waited(pending[held][1], self.exchange.begin)
        with self.exchange.meter.waits(what):
            wait(waited, self.exchange.watchdog, what)
        del pending[held]

    def _views(self, held: Buffer, leg: Leg) -> list[Array]:
        return cut(held.array, self.fields(leg), self.exchange.dtype_of)
