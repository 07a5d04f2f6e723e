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

    def rotation(self, kind: Kind) -> "Rotation":
        """Return the rotation of one kind of block."""
        return Rotation(self, kind)

    def accumulators(self, *arrays: Array) -> list[Array]:
        """Return zeros in the shapes of keys, for their gradients; of no keys if not wanted."""
        if "k" not in self.wanted:
            arrays = tuple(x[:, :, :0] for x in arrays)
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

    def __init__(self, exchange: Exchange, kind: Kind) -> None:
        super().__init__(exchange.layout, kind)
        self.exchange = exchange
        self.block: list[Array] = []

    def send(self, *arrays: Array, hop: int) -> None:
        """Send the block that is here at a hop to its next stop, if it has one."""
        self.block = list(arrays)
        self.pass_on(hop)

    def pass_on(self, hop: int) -> None:
        """Send the block received at a hop to its next stop, if it has one."""
        if hop in self.leaves:
            exchange, leg = self.exchange, self.leaves[hop]
            rows = [x[:, :, leg.rows] for x in self.block] if not leg.whole else self.block
            nbytes = sum(x.nbytes for x in rows)
            exchange.meter.sent(nbytes, self.dest(leg), lambda: self.leaving(leg))
            exchange.comm.send(rows, self.dest(leg), self.kind.tag)

    def receive(self, hop: int) -> list[Array]:
        """Wait for the block that comes at a hop, and return its arrays.

        Rows that did not travel, as they see nothing here, are filled in.
        """
        leg = self.comes[hop]
        with self.exchange.meter.waits(lambda: self.awaited(leg)):
            self.block = self.exchange.comm.recv(self.source(leg), self.kind.tag)
        self.block = self.filled_in(self.block, leg, lambda shape, value, _: np.full(shape, value))
        return self.block
