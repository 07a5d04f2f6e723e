"""How blocks move: every rank hands what it holds to the right and takes over from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops it has been everywhere

A `Rotation` is one kind of block going round: queries, or the results that follow them.  It has two
buffers: while one is on its way to the right, the next block comes from the left into the other,
and both requests progress while the rank computes.  On a device a request is made once kernels and
copies are done with its buffer (`buffers`), whenever the rank waits or lets MPI work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from lvxattn.common.layout import Layout
from lvxattn.common.meter import Block, Meter
from lvxattn.common.passes import Pass, Round
from lvxattn.common.wire import NAMES, Kind

from .merge import Array
from .transport.buffers import buffer
from .transport.device import array_module
from .transport.transfers import Transfer, Waited
from .transport.watchdog import Watchdog, wait


class Field(NamedTuple):
    """Shape and dtype of one array of a block."""

    shape: tuple[int, ...]
    dtype: Any


# Those of a block by its owner.
Fields = Callable[[int], list[Field]]


class Exchange(Pass):
    """One rank's traffic and work in one pass: made by the front door, given to a schedule.

    Parameters
    ----------
    comm : MPI.Intracomm
    layout : Layout
    q : array
        Tells the library, the device and the dtype.
    mask : None, array or callable
        This rank's.
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
        self.watchdog = Watchdog.armed(comm)

    def rotation(self, kind: Kind, start: int = 0) -> "Rotation":
        """Return the rotation of one kind of block, which begins at hop `start`."""
        rotation = Rotation(self, kind, start)
        self.rotations.append(rotation)
        return rotation

    def accumulators(self, *arrays: Array, once: bool = False) -> list[Array]:
        """Return zeros to which gradients of these arrays are added, `once` or at every hop."""
        once = once or self.P == 1  # then nothing is lost by the arrays' own dtype
        return [self.xp.zeros(x.shape, x.dtype if once else self.wide) for x in arrays]

    @contextmanager
    def computing(self, hop: int = 0, what: str = "") -> Iterator[None]:
        """Measure work on the block that is here at a hop, or on `what`."""
        block = Block(what or NAMES[self.layout.schedule][0], self.layout.owner(hop), hop)
        try:
            with self.meter.computes(lambda: block):
                yield
        except MemoryError as error:
            error.add_note(f"while computing with {block}")
            raise

    def progress(self) -> None:
        """Let MPI move what is under way; without such calls large messages stand still."""
        self.begin()
        MPI.Request.Testall([r for rotation in self.rotations for r in rotation.requests])

    def finish(self) -> None:
        """Wait until what this rank has sent is gone, so that no request outlives the pass."""
        for rotation in self.rotations:
            rotation.wait_sent()
            for held in rotation.buffers:
                held.settle()

    def begin(self) -> None:
        """Make the requests that have become possible."""
        for rotation in self.rotations:
            rotation.sending.begin()
            rotation.receiving.begin()


class Rotation(Round):
    """One kind of block going round the ring.

    Attributes
    ----------
    nbytes : int
        The size of the largest block.
    """

    def __init__(self, exchange: Exchange, kind: Kind, hop: int) -> None:
        super().__init__(exchange.layout, kind, hop)
        self.exchange = exchange
        self.nbytes = max(self._nbytes(owner) for owner in range(exchange.layout.size))
        # In hand, and to be received into; a rank that is alone needs neither, nor asks MPI what
        # memory it takes.
        count = 2 if exchange.layout.size > 1 else 0
        try:
            self.buffers = [buffer(exchange.xp, self.nbytes) for _ in range(count)]
        except Exception as error:
            largest = max(range(exchange.layout.size), key=self._nbytes)
            error.add_note(f"for {kind.name.format(largest)}, the largest block")
            raise
        self.sending, self.receiving = Transfer.nothing(), Transfer.nothing()

    @property
    def requests(self) -> tuple[MPI.Request, MPI.Request]:
        """What is under way."""
        return self.sending.request, self.receiving.request

    def send(self, *arrays: Array) -> None:
        """Send arrays to the right, and begin to receive the next block from the left."""
        if self.exchange.P > 1:
            for view, x in zip(self._views(), arrays, strict=True):
                view[...] = x  # in place: what was received there has been used
            self.buffers[0].filled()
            self.forward()

    def forward(self) -> None:
        """Send on the block that was received last, and begin to receive the next one.

        The block that was received before it is overwritten from now on.
        """
        comm, layout, meter = self.exchange.comm, self.layout, self.exchange.meter
        in_hand, free = self.buffers
        mine = self._nbytes(layout.owner(self.hop))
        coming = self._nbytes(layout.owner(self.hop + 1))
        # The block sent last left from `free`: until it is gone nothing may be received there.
        self.wait_sent()
        self.hop += 1
        meter.sent(mine, layout.right, self.leaving)
        room, empty = free.receivable(coming)
        block, whole = in_hand.sendable(mine)
        self.receiving = Transfer(
            lambda: comm.Irecv([room, MPI.BYTE], layout.left, self.kind.tag), empty
        )
        self.sending = Transfer(
            lambda: comm.Isend([block, MPI.BYTE], layout.right, self.kind.tag), whole
        )
        self.buffers = [free, in_hand]

    def receive(self) -> list[Array]:
        """Wait for the next block, and return its arrays.

        They are views of a buffer, good until the next but one block is sent.
        """
        self._wait_for(self.receiving, self.awaited)
        self.buffers[0].deliver(self._nbytes(self.layout.owner(self.hop)))
        return self._views()

    def wait_sent(self) -> None:
        """Wait until the block that was sent last is gone."""
        self._wait_for(self.sending, self.leaving)

    def _wait_for(self, transfer: Transfer, what: Callable[[], Block]) -> None:
        waited = Waited(transfer, self.exchange.begin)
        with self.exchange.meter.waits(what):
            wait(waited, self.exchange.watchdog, what)

    def _views(self) -> list[Array]:
        layout, dtype = self.layout, self.exchange.dtype
        fields = self.kind.fields(layout, layout.owner(self.hop))
        # NumPy knows bfloat16 by q alone.
        like = [dtype if x.dtype == layout.dtype else np.dtype(x.dtype) for x in fields]
        cuts = [Field(x.shape, kind) for x, kind in zip(fields, like, strict=True)]
        return cut(self.buffers[0].array, cuts)

    def _nbytes(self, owner: int) -> int:
        return self.kind.nbytes(self.layout, owner)


def cut(array: Array, fields: list[Field]) -> list[Array]:
    """Return the arrays of a block that lies in a buffer of bytes, as views."""
    views: dict[int, Array] = {}
    start = 0
    # Wide dtypes first, so that every array is aligned without gaps.
    for i in sorted(range(len(fields)), key=lambda i: -fields[i][1].itemsize):
        shape, dtype = fields[i]
        stop = start + prod(shape) * dtype.itemsize
        views[i] = array[start:stop].view(dtype).reshape(shape)
        start = stop
    return [views[i] for i in range(len(fields))]


def nbytes(fields: list[Field]) -> int:
    """Return how many bytes a block has."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in fields)
