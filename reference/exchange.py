"""How blocks move: every rank hands what it holds to the right and takes over from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops it has been everywhere

A `Rotation` is one kind of block going round: queries, or the results that follow them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy.typing as npt

from lvxattn.reference.layout import Layout
from lvxattn.reference.meter import KINDS, Block, Meter
from lvxattn.reference.virtual_ranks import VirtualComm

Array = npt.NDArray[Any]
Result = TypeVar("Result")

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

    def rotation(self, tag: int, hop: int = 0) -> "Rotation":
        """Return the rotation of one kind of block.

        Parameters
        ----------
        tag : int
        hop : int
            At which hop the first shift happens.
        """
        return Rotation(self, tag, hop)

    def computes(self, fn: Callable[..., Result], kind: str = "") -> Callable[..., Result]:
        """Return `fn` with a hop as an argument before its own, for the meter.

        `kind` is what it works on, where that does not go round.
        """
        kind = kind or KINDS[self.layout.schedule][0]
        return self.meter.computes(fn, lambda hop: Block(kind, self.layout.owner(hop), hop))


class Rotation:
    """One kind of block going round the ring."""

    def __init__(self, exchange: Exchange, tag: int, hop: int) -> None:
        self.exchange, self.tag, self.hop = exchange, tag, hop
        self.kind = KINDS[exchange.layout.schedule][tag == RESULTS]
        self.block: list[Array] = []

    def shift(self, *arrays: Array) -> None:
        """Send a block to the right and start to receive the next one from the left.

        What is sent is `arrays` or, without them, the block that was received last.
        """
        block = list(arrays) or self.block
        right = self.exchange.layout.right
        self.hop += 1
        self.exchange.meter.sent(sum(x.nbytes for x in block), right, self._leaving)
        self.exchange.comm.send(block, right, self.tag)

    def wait(self) -> list[Array]:
        """Wait for the block that `shift` asked for, and return its arrays."""
        receive = self.exchange.meter.waits(self.exchange.comm.recv, self._awaited)
        self.block = receive(self.exchange.layout.left, self.tag)
        return self.block

    def _awaited(self) -> Block:
        layout = self.exchange.layout
        return Block(self.kind, layout.owner(self.hop), self.hop, source=layout.left)

    def _leaving(self) -> Block:
        layout = self.exchange.layout
        return Block(self.kind, layout.owner(self.hop - 1), self.hop, dest=layout.right)
