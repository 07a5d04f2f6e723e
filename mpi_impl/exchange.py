"""How blocks travel round a ring: every rank sends to the right and receives from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops every rank has had it

A `Rotation` is one kind of block on its way round: queries, or the results that follow them.  It
has two buffers: while one is sent to the right, the next block is received from the left into the
other, and both requests progress while the rank computes.  On a device a request starts once
kernels and copies have finished with its buffer (see `transport.buffers`); this is checked whenever
the rank waits or calls `progress`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.common.exchange_base import ExchangeBase, RotationBase
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import NAMES, Kind, cut

from .merge import Array
from .transport.buffers import buffer
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
        self.rotations: list[Rotation] = []
        self.watchdog = Watchdog.armed(comm, layout.hosts)

    def rotation(self, kind: Kind, start: int = 0) -> "Rotation":
        """Return the rotation of one kind of block, which begins at hop `start`."""
        rotation = Rotation(self, kind, start)
        self.rotations.append(rotation)
        return rotation

    def accumulators(self, *arrays: Array) -> list[Array]:
        """Return zeros in the shapes of these arrays, to which their gradients are added."""
        # Where only one block is added, the arrays' own dtype loses nothing.
        once = self.P == 1 or self.layout.way in ("gather", "replicated")
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
        MPI.Request.Testall([r for rotation in self.rotations for r in rotation.requests])

    def finish(self) -> None:
        """Wait for pending sends, so that no request is left."""
        for rotation in self.rotations:
            rotation.wait_sent()
            for held in rotation.buffers:
                held.settle()

    def begin(self) -> None:
        """Start the requests whose buffers have become ready."""
        for rotation in self.rotations:
            rotation.sending.begin()
            rotation.receiving.begin()


class Rotation(RotationBase):
    """One kind of block travelling round the ring.

    Attributes
    ----------
    nbytes : int
        The size of the largest block.
    """

    def __init__(self, exchange: Exchange, kind: Kind, hop: int) -> None:
        super().__init__(exchange.layout, kind, hop)
        self.exchange = exchange
        sizes = [kind.nbytes(self.layout, owner) for owner in range(exchange.P)]
        self.nbytes = max(sizes)
        # The current block's, and the next block's; one rank needs neither.
        count = 2 if exchange.P > 1 else 0
        try:
            self.buffers = [buffer(exchange.xp, self.nbytes) for _ in range(count)]
        except Exception as error:
            largest = kind.name.format(sizes.index(self.nbytes))
            error.add_note(f"for {largest}, the largest block")
            raise
        self.sending, self.receiving = Transfer.nothing(), Transfer.nothing()

    @property
    def requests(self) -> tuple[MPI.Request, MPI.Request]:
        """The pending send and receive."""
        return self.sending.request, self.receiving.request

    def send(self, *arrays: Array) -> None:
        """Send arrays to the right, and start to receive from the left; nothing with one rank."""
        if self.exchange.P > 1:
            for view, x in zip(self._views(), arrays, strict=True):
                view[...] = x  # over the block received before, which has been used
            self.buffers[0].filled()
            self.pass_on()

    def pass_on(self) -> None:
        """Send the current block to the right, and start to receive the next one.

        The next one overwrites the block before the current one.
        """
        comm, layout, meter = self.exchange.comm, self.layout, self.exchange.meter
        current, free = self.buffers
        outgoing, incoming = self._nbytes(self.hop), self._nbytes(self.hop + 1)
        # The block before was sent from `free`: nothing may be received there until it has left.
        self.wait_sent()
        self.hop += 1
        meter.sent(outgoing, layout.right, self.leaving)
        room, empty = free.receivable(incoming)
        block, whole = current.sendable(outgoing)
        self.receiving = Transfer(
            lambda: comm.Irecv([room, MPI.BYTE], layout.left, self.kind.tag), empty
        )
        self.sending = Transfer(
            lambda: comm.Isend([block, MPI.BYTE], layout.right, self.kind.tag), whole
        )
        self.buffers = [free, current]

    def receive(self) -> list[Array]:
        """Wait for the next block from the left, and return its arrays.

        They are views of a buffer, valid until the next but one block is sent.
        """
        self._wait_for(self.receiving, self.awaited)
        self.buffers[0].deliver(self._nbytes(self.hop))
        return self._views()

    def wait_sent(self) -> None:
        """Wait until the last send is complete."""
        self._wait_for(self.sending, self.leaving)

    def _wait_for(self, transfer: Transfer, what: Callable[[], Block]) -> None:
        waited = Waited(transfer, self.exchange.begin)
        with self.exchange.meter.waits(what):
            wait(waited, self.exchange.watchdog, what)

    def _views(self) -> list[Array]:
        fields = self.kind.fields(self.layout, self.layout.owner(self.hop))
        return cut(self.buffers[0].array, fields, self.exchange.dtype_of)

    def _nbytes(self, hop: int) -> int:
        return self.kind.nbytes(self.layout, self.layout.owner(hop))
