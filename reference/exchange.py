"""How blocks move: every rank hands what it holds to the right and takes over from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops it has been everywhere

A `Rotation` is one kind of block going round: queries, or the results that follow them.
"""

from typing import Any

import numpy.typing as npt

from lvxattn.reference.layout import Layout
from lvxattn.reference.meter import Meter
from lvxattn.reference.virtual_ranks import VirtualComm

Array = npt.NDArray[Any]

# One tag for each kind of block: two rotations are under way at once.
BLOCKS, RESULTS = 7001, 7002


class Exchange:
    """One rank's traffic in one pass.

    Parameters
    ----------
    comm : VirtualComm
    layout : Layout
    meter : Meter
        Counts what this rank sends.
    """

    def __init__(self, comm: VirtualComm, layout: Layout, meter: Meter) -> None:
        self.comm, self.layout, self.meter = comm, layout, meter

    def rotation(self, tag: int) -> "Rotation":
        """Return the rotation of one kind of block."""
        return Rotation(self, tag)


class Rotation:
    """One kind of block going round the ring."""

    def __init__(self, exchange: Exchange, tag: int) -> None:
        self.exchange, self.tag = exchange, tag
        self.block: list[Array] = []

    def shift(self, *arrays: Array) -> None:
        """Send a block to the right and start to receive the next one from the left.

        What is sent is `arrays` or, without them, the block that was received last.
        """
        block = list(arrays) or self.block
        self.exchange.meter.sent(sum(x.nbytes for x in block))
        self.exchange.comm.send(block, self.exchange.layout.right, self.tag)

    def wait(self) -> list[Array]:
        """Wait for the block that `shift` asked for, and return its arrays."""
        receive = self.exchange.meter.waits(self.exchange.comm.recv)
        self.block = receive(self.exchange.layout.left, self.tag)
        return self.block
