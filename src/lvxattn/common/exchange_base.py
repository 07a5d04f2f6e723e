"""The common part of every implementation's `Exchange` and `Rotation`: where blocks are, when."""

from typing import Any

from lvxattn.common.layout import Layout
from lvxattn.common.masks import MaskView
from lvxattn.common.meter import Block, Meter
from lvxattn.common.wire import Kind


class ExchangeBase:
    """One rank's communication in one forward or backward.

    Attributes
    ----------
    layout : Layout
    mask : None, array or callable
        Of this rank's keys.
    meter : Meter
    P, rank : int
        The number of ranks, and this one.
    scale : float
    """

    def __init__(self, layout: Layout, mask: Any, meter: Meter | None) -> None:
        self.layout, self.mask, self.meter = layout, mask, meter or Meter()
        self.P, self.rank, self.scale = layout.size, layout.rank, layout.scale

    def mask_view(self, hop: int) -> MaskView:
        """Return the mask of my keys over the queries that are here at a hop."""
        return self.layout.view(self.mask, self.layout.owner(hop), self.rank)

    def mask_view_of_all(self) -> MaskView:
        """Return the mask of my keys over all ranks' queries."""
        return self.layout.view(self.mask, 0, self.rank)

    def split_keys(self, *arrays: Any) -> tuple[list[Any], list[Any]]:
        """Return both halves of arrays over my keys, as views along axis 2, and of their mask.

        With one rank, where nothing travels, the first half is all keys.
        """
        cut, mask = self.layout.home_cut, self.mask_view(hop=0)
        first, second = ([x[:, :, keys] for x in arrays] for keys in (slice(cut), slice(cut, None)))
        return [*first, mask], [*second, mask.from_key(cut)]


class RotationBase:
    """One kind of block travelling round the ring; `hop` is the last one that was begun."""

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
