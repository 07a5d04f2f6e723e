"""Base classes of every implementation's `Exchange` and `Rotation`: owners, hops and masks."""

from typing import Any

from lvxattn.common.layout import Layout
from lvxattn.common.masks import MaskView
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import Kind


class Pass:
    """One pass on one rank.

    Attributes
    ----------
    layout : Layout
    mask : None, array or callable
        This rank's.
    meter : Meter
    P, rank : int
    scale : float
    """

    def __init__(self, layout: Layout, mask: Any, meter: Meter | None) -> None:
        self.layout, self.mask, self.meter = layout, mask, meter or Meter()
        self.P, self.rank, self.scale = layout.size, layout.rank, layout.scale

    def view(self, hop: int = 0) -> MaskView:
        """Return my keys' mask over the queries that are here at a hop."""
        return self.layout.view(self.mask, self.layout.owner(hop), self.rank)

    def view_of_all(self) -> MaskView:
        """Return my keys' mask over all ranks' queries."""
        return self.layout.view(self.mask, 0, self.rank)

    def split_home(self, *arrays: Any) -> tuple[list[Any], list[Any]]:
        """Split arrays over my keys, and their mask, into a first and a last part of the work."""
        cut, mask = self.layout.home_cut, self.view()
        first, last = ([x[:, :, keys] for x in arrays] for keys in (slice(cut), slice(cut, None)))
        return [*first, mask], [*last, mask.from_key(cut)]


class Round:
    """The rotation of one kind of block round the ring; `hop` is the last one begun."""

    def __init__(self, layout: Layout, kind: Kind, hop: int) -> None:
        self.layout, self.kind, self.hop = layout, kind, hop

    def awaited(self) -> Block:
        """Return the block that comes from the left at this hop."""
        layout = self.layout
        return Block(self.kind.name, layout.owner(self.hop), self.hop, source=layout.left)

    def leaving(self) -> Block:
        """Return the block that goes to the right at this hop."""
        layout = self.layout
        return Block(self.kind.name, layout.owner(self.hop - 1), self.hop, dest=layout.right)
