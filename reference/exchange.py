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
from lvxattn.common.masks import MaskView
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import NAMES, Kind

from .merge import Array
from .virtual_ranks import VirtualComm


class Exchange:
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
        self.comm, self.layout, self.mask, self.meter = comm, layout, mask, meter or Meter()
        self.P, self.rank, self.scale = layout.size, layout.rank, layout.scale

    def rotation(self, kind: Kind, start: int = 0) -> "Rotation":
        """Return the rotation of one kind of block, which begins at hop `start`."""
        return Rotation(self, kind, start)

    def view(self, hop: int = 0) -> MaskView:
        """Return my keys' mask over the queries that are here at a hop."""
        return self.layout.view(self.mask, self.layout.owner(hop), self.rank)

    def view_of_all(self) -> MaskView:
        """Return my keys' mask over all ranks' queries."""
        return self.layout.view(self.mask, 0, self.rank)

    def split_home(self, *arrays: Array) -> tuple[list[Any], list[Any]]:
        """Cut arrays over my keys, and their mask, in two: to work on first, and last."""
        cut, mask = self.layout.home_cut, self.view()
        first, last = ([x[:, :, keys] for x in arrays] for keys in (np.s_[:cut], np.s_[cut:]))
        return [*first, mask], [*last, mask.from_key(cut)]

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


class Rotation:
    """One kind of block going round the ring."""

    def __init__(self, exchange: Exchange, kind: Kind, hop: int) -> None:
        self.exchange, self.kind, self.hop = exchange, kind, hop
        self.block: list[Array] = []

    def send(self, *arrays: Array) -> None:
        """Send arrays to the right, and take what comes from the left from now on."""
        if self.exchange.P > 1:
            self.block = list(arrays)
            self.forward()

    def forward(self) -> None:
        """Send on the block that was received last."""
        exchange, right = self.exchange, self.exchange.layout.right
        self.hop += 1
        exchange.meter.sent(sum(x.nbytes for x in self.block), right, self._leaving)
        exchange.comm.send(self.block, right, self.kind.tag)

    def receive(self) -> list[Array]:
        """Wait for the next block, and return its arrays."""
        with self.exchange.meter.waits(self._awaited):
            self.block = self.exchange.comm.recv(self.exchange.layout.left, self.kind.tag)
        return self.block

    def _awaited(self) -> Block:
        layout = self.exchange.layout
        return Block(self.kind.name, layout.owner(self.hop), self.hop, source=layout.left)

    def _leaving(self) -> Block:
        layout = self.exchange.layout
        return Block(self.kind.name, layout.owner(self.hop - 1), self.hop, dest=layout.right)
