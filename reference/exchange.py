"""How blocks move: every rank hands what it holds to the right and takes over from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops it has been everywhere

A `Rotation` is one kind of block going round: queries, or the results that follow them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lvxattn.common.layout import Layout
from lvxattn.common.meter import Block, Meter
from lvxattn.common.passes import Pass, Round
from lvxattn.common.wire import NAMES, Kind

from .merge import Array
from .virtual_ranks import VirtualComm


class Exchange(Pass):
    """One rank's traffic and work in one pass: made by the front door, given to a schedule.

    Parameters
    ----------
    comm : VirtualComm
    layout : Layout
    mask : None, array or callable
        This rank's.
    meter : Meter, optional
        Counts what this rank sends.
    """

    def __init__(
        self, comm: VirtualComm, layout: Layout, mask: Any = None, meter: Meter | None = None
    ) -> None:
        super().__init__(layout, mask, meter)
        self.comm = comm

    def rotation(self, kind: Kind, start: int = 0) -> "Rotation":
        """Return the rotation of one kind of block, which begins at hop `start`."""
        return Rotation(self, kind, start)

    def accumulators(self, *arrays: Array, once: bool = False) -> list[Array]:  # noqa: ARG002
        """Return zeros to which gradients of these arrays are added, `once` or at every hop."""
        return [np.zeros(x.shape) for x in arrays]

    @contextmanager
    def computing(self, hop: int = 0, what: str = "") -> Iterator[None]:
        """Measure work on the block that is here at a hop, or on `what`."""
        block = Block(what or NAMES[self.layout.schedule][0], self.layout.owner(hop), hop)
        with self.meter.computes(lambda: block):
            yield

    def finish(self) -> None:
        """Do nothing: what a virtual rank sends is there at once."""


class Rotation(Round):
    """One kind of block going round the ring."""

    def __init__(self, exchange: Exchange, kind: Kind, hop: int) -> None:
        super().__init__(exchange.layout, kind, hop)
        self.exchange = exchange
        self.block: list[Array] = []

    def send(self, *arrays: Array) -> None:
        """Send arrays to the right, and take what comes from the left from now on."""
        if self.exchange.P > 1:
            self.block = list(arrays)
            self.forward()

    def forward(self) -> None:
        """Send on the block that was received last."""
        exchange, right = self.exchange, self.layout.right
        self.hop += 1
        exchange.meter.sent(sum(x.nbytes for x in self.block), right, self.leaving)
        exchange.comm.send(self.block, right, self.kind.tag)

    def receive(self) -> list[Array]:
        """Wait for the next block, and return its arrays."""
        with self.exchange.meter.waits(self.awaited):
            self.block = self.exchange.comm.recv(self.layout.left, self.kind.tag)
        return self.block
