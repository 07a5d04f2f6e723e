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

from lvxattn.common.exchange_base import BufferedRotation, ExchangeBase, Leg
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import NAMES, Kind, cut

from .merge import Array
from .transport import buffers
from .transport.buffers import Buffer
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

    def buffer(self, nbytes: int, *, direct: bool = True) -> Buffer:
        """Return a buffer of at least so many bytes for messages, until `finish`.

        Parameters
        ----------
        nbytes : int
        direct : bool
            Whether to pass device memory to MPI if that supports it.
        """
        if self.xp is not np:  # a device has a pool of its own
            return buffers.buffer(self.xp, nbytes, direct=direct)
        buffer: Buffer = self.take("host", nbytes, partial(buffers.buffer, np))
        return buffer

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
        """Wait for pending sends, so that no request is left and their buffers are free again."""
        for rotation in self.rotations:
            for held in rotation.buffers:
                rotation.wait_sent(held)
                held.settle()
        self.give_back()

    def begin(self) -> None:
        """Start the requests whose buffers have become ready."""
        for rotation in self.rotations:
            for transfer in rotation.transfers:
                transfer.begin()


class Rotation(BufferedRotation):
    """One kind of block travelling round the ring.

    Attributes
    ----------
    largest : int
        The size of the largest block, in bytes.
    pending : dict of Transfer
        The sends and receives that are not complete, by buffer.
    """

    exchange: Exchange

    def __init__(self, exchange: Exchange, kind: Kind) -> None:
        super().__init__(exchange, kind)
        sizes = [kind.nbytes(self.layout, owner) for owner in range(exchange.P)]
        self.largest = max(sizes)
        self.largest_owner = sizes.index(self.largest)
        self.pending: dict[Buffer, Transfer] = {}
        for _ in range(2 if self.due else 0):
            self._allocate()

    @property
    def transfers(self) -> list[Transfer]:
        """The pending sends and receives."""
        return list(self.pending.values())

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
        held = self.receiving[hop]
        self._wait_for(held, lambda: self.awaited(leg))
        del self.receiving[hop]
        held.deliver(self.nbytes(leg))
        self.here, full = held, self.exchange.xp.full
        self.arrays = self.filled_in(
            self._views(held, leg), leg, lambda shape, value, x: full(shape, value, x.dtype)
        )
        return self.arrays

    def start(self, stop: int, legs: list[Leg]) -> None:
        """Start the transfers that end at a stop: of one block that comes, and of those leaving."""
        comm, tag = self.exchange.comm, self.kind.tag
        if (coming := self.comes.get(stop)) is not None:
            free, source = self._free(), self.source(coming)
            room, empty = free.receivable(self.nbytes(coming))
            self.receiving[stop] = free
            self.pending[free] = Transfer(lambda: comm.Irecv([room, MPI.BYTE], source, tag), empty)
        for leg in legs:
            held = self.loaded.pop(leg.start)
            block, whole = held.sendable(self.nbytes(leg))
            self.exchange.meter.sent(self.nbytes(leg), self.dest(leg), partial(self.leaving, leg))
            # Messages of one tag must not overtake one another, whichever buffer is ready first.
            before = [self.pending[other] for other in self.sending]
            self.sending[held] = leg
            self.pending[held] = Transfer(
                partial(comm.Isend, [block, MPI.BYTE], self.dest(leg), tag), whole,
                partial(_all_begun, before),
            )  # fmt: skip

    def wait_sent(self, held: Buffer) -> None:
        """Wait until the last send from a buffer is complete."""
        if held in self.sending:
            leg = self.sending[held]
            self._wait_for(held, lambda: self.leaving(leg))
            del self.sending[held]

    def _allocate(self) -> Buffer:
        try:
            held = self.exchange.buffer(self.largest)
        except Exception as error:
            error.add_note(f"for {self.kind.name.format(self.largest_owner)}, the largest block")
            raise
        self.buffers.append(held)
        return held

    def _wait_for(self, held: Buffer, what: Callable[[], Block]) -> None:
        waited = Waited(self.pending[held], self.exchange.begin)
        with self.exchange.meter.waits(what):
            wait(waited, self.exchange.watchdog, what)
        del self.pending[held]

    def _views(self, held: Buffer, leg: Leg) -> list[Array]:
        return cut(held.array, self.fields(leg), self.exchange.dtype_of)


def _all_begun(transfers: list[Transfer]) -> bool:
    """Return whether all of these have begun."""
    return all(transfer.begun for transfer in transfers)
