"""How blocks move: every rank hands what it holds to the right and takes over from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops it has been everywhere

A `Rotation` is one kind of block going round: queries, or the results that follow them.  It has two
buffers: while one is on its way to the right, the next block comes from the left into the other,
and both requests progress while the rank computes.  On a device a request is made once kernels and
copies are done with its buffer (`buffers`), whenever the rank waits or lets MPI work.
"""

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

from mpi4py import MPI

from lvxattn.mpi_impl.buffers import buffer
from lvxattn.mpi_impl.transfers import Transfer, Waited
from lvxattn.mpi_impl.watchdog import Watchdog, wait
from lvxattn.reference.layout import Layout
from lvxattn.reference.meter import KINDS, Block, Meter

Array = Any
Result = TypeVar("Result")
# Shape and dtype of one array of a block, and those of a block by its owner.
Field = tuple[tuple[int, ...], Any]
Fields = Callable[[int], list[Field]]

# One tag for each kind of block: two rotations are under way at once.
BLOCKS, RESULTS = 7001, 7002


class Exchange:
    """One rank's traffic in one pass.

    Parameters
    ----------
    comm : MPI.Intracomm
    layout : Layout
    meter : Meter
        Counts what this rank sends.
    xp : module
        numpy or cupy.
    """

    def __init__(self, comm: MPI.Intracomm, layout: Layout, meter: Meter, xp: Any) -> None:
        self.comm, self.layout, self.meter, self.xp = comm, layout, meter, xp
        self.rotations: list[Rotation] = []
        self.watchdog = Watchdog.armed(comm)

    def rotation(self, tag: int, fields: Fields, hop: int = 0) -> "Rotation":
        """Return the rotation of one kind of block.

        Parameters
        ----------
        tag : int
        fields : callable
            The shapes and dtypes of a block, by its owner: MPI must know how much will come.
        hop : int
            At which hop the first shift happens.
        """
        rotation = Rotation(self, tag, fields, hop)
        self.rotations.append(rotation)
        return rotation

    def computes(self, fn: Callable[..., Result], kind: str = "") -> Callable[..., Result]:
        """Return `fn` with a hop as an argument before its own, for the meter.

        `kind` is what it works on, where that does not go round.
        """
        kind = kind or KINDS[self.layout.schedule][0]

        def block(hop: int) -> Block:
            return Block(kind, self.layout.owner(hop), hop)

        timed = self.meter.computes(fn, block)

        def computing(hop: int, *args: Any, **kwargs: Any) -> Result:
            try:
                return timed(hop, *args, **kwargs)
            except MemoryError as error:
                error.add_note(f"it was asked for to compute with {block(hop)}")
                raise

        return computing

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


class Rotation:
    """One kind of block going round the ring.

    Attributes
    ----------
    nbytes : int
        The size of the largest block.
    """

    def __init__(self, exchange: Exchange, tag: int, fields: Fields, hop: int) -> None:
        self.exchange, self.tag, self.fields, self.hop = exchange, tag, fields, hop
        self.kind = KINDS[exchange.layout.schedule][tag == RESULTS]
        self.nbytes = max(self._nbytes(owner) for owner in range(exchange.layout.size))
        # In hand, and to be received into; a rank that is alone needs neither, nor asks MPI what
        # memory it takes.
        count = 2 if exchange.layout.size > 1 else 0
        try:
            self.buffers = [buffer(exchange.xp, self.nbytes) for _ in range(count)]
        except Exception as error:
            largest = max(range(exchange.layout.size), key=self._nbytes)
            error.add_note(f"it was to hold {self.kind.format(largest)}, the largest block")
            raise
        self.sending, self.receiving = Transfer.nothing(), Transfer.nothing()

    @property
    def requests(self) -> tuple[MPI.Request, MPI.Request]:
        """What is under way."""
        return self.sending.request, self.receiving.request

    def shift(self, *arrays: Array) -> None:
        """Send a block to the right and start to receive the next one from the left.

        What is sent is `arrays` or, without them, the block that was received last.  The block that
        was received before that one is overwritten from now on.
        """
        comm, layout, meter = self.exchange.comm, self.exchange.layout, self.exchange.meter
        in_hand, free = self.buffers
        mine = self._nbytes(layout.owner(self.hop))
        coming = self._nbytes(layout.owner(self.hop + 1))
        if arrays:
            for view, x in zip(self._views(), arrays, strict=True):
                view[...] = x  # in place: what was received there has been used
            in_hand.filled()
        # The block sent last left from `free`: until it is gone nothing may be received there.
        self.wait_sent()
        self.hop += 1
        meter.sent(mine, layout.right, self._leaving)
        room, empty = free.receivable(coming)
        block, whole = in_hand.sendable(mine)
        self.receiving = Transfer(
            lambda: comm.Irecv([room, MPI.BYTE], layout.left, self.tag), empty
        )
        self.sending = Transfer(
            lambda: comm.Isend([block, MPI.BYTE], layout.right, self.tag), whole
        )
        self.buffers = [free, in_hand]

    def wait(self) -> list[Array]:
        """Wait for the block that `shift` asked for, and return its arrays.

        They are views of a buffer, good until the next but one call of `shift`.
        """
        self._wait_for(self.receiving, self._awaited)
        self.buffers[0].deliver(self._nbytes(self.exchange.layout.owner(self.hop)))
        return self._views()

    def wait_sent(self) -> None:
        """Wait until the block that was sent last is gone."""
        self._wait_for(self.sending, self._leaving)

    def _wait_for(self, transfer: Transfer, what: Callable[[], Block]) -> None:
        waited = Waited(transfer, self.exchange.begin)
        self.exchange.meter.waits(wait, what)(waited, self.exchange.watchdog, what)

    def _awaited(self) -> Block:
        layout = self.exchange.layout
        return Block(self.kind, layout.owner(self.hop), self.hop, source=layout.left)

    def _leaving(self) -> Block:
        layout = self.exchange.layout
        return Block(self.kind, layout.owner(self.hop - 1), self.hop, dest=layout.right)

    def _views(self) -> list[Array]:
        return cut(self.buffers[0].array, self.fields(self.exchange.layout.owner(self.hop)))

    def _nbytes(self, owner: int) -> int:
        return nbytes(self.fields(owner))


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
