"""How blocks travel round a ring: every rank sends to the right and receives from the left.

    hop 1     rank 0 --> 1 --> 2 --> 3 --+        after hop h a block is h places right of its
              ^--------------------------+        owner; after P - 1 hops every rank has had it

A `Rotation` is one kind of block on its way round: queries, or the results that follow them.

Between virtual ranks a message arrives at once, and no work overlaps with its transfer.  Steps are
ordered as in the other implementations, where it does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lvxattn.common.exchange_base import ExchangeBase, RotationBase
from lvxattn.common.layout import Layout
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import NAMES, Kind

from .merge import Array
from .virtual_ranks import VirtualComm


class Exchange(ExchangeBase):
    """One rank's communication in one forward or backward; the front door passes it to a schedule.

    From `lvxattn.common.exchange_base`: `split_keys` cuts keys, values and mask in two halves; the
    second has the extra key if their number is odd.  `mask_view(hop)` is the mask for the block
    that is here after `hop` hops, that of rank ``layout.owner(hop)``, `hop` places to the left.

    Parameters
    ----------
    comm : VirtualComm
    layout : Layout
    mask : None, array or callable
        Of this rank's keys.
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

    def accumulators(self, *arrays: Array) -> list[Array]:
        """Return zeros in the shapes of these arrays, to which their gradients are added."""
        return [np.zeros(x.shape) for x in arrays]

    @contextmanager
    def computing(self, hop: int = 0, what: str = "") -> Iterator[None]:
        """Measure the time of work on the block that is here at a hop, or on `what`."""
        block = Block(what or NAMES[self.layout.schedule][0], self.layout.owner(hop), hop)
        with self.meter.computes(lambda: block):
            yield

    def finish(self) -> None:
        """Wait for pending sends.  Virtual ranks have none."""


class Rotation(RotationBase):
    """One kind of block travelling round the ring."""

    def __init__(self, exchange: Exchange, kind: Kind, hop: int) -> None:
        super().__init__(exchange.layout, kind, hop)
        self.exchange = exchange
        self.block: list[Array] = []

    def send(self, *arrays: Array) -> None:
        """Send arrays to the right; with one rank, do nothing."""
        if self.exchange.P > 1:
            self.block = list(arrays)
            self.pass_on()

    def pass_on(self) -> None:
        """Send the current block to the right: the one received last, or given to `send`."""
        exchange, right = self.exchange, self.layout.right
        self.hop += 1
        exchange.meter.sent(sum(x.nbytes for x in self.block), right, self.leaving)
        exchange.comm.send(self.block, right, self.kind.tag)

    def receive(self) -> list[Array]:
        """Wait for the next block from the left, and return its arrays."""
        with self.exchange.meter.waits(self.awaited):
            self.block = self.exchange.comm.recv(self.layout.left, self.kind.tag)
        return self.block
