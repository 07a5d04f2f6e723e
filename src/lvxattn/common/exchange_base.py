"""The common part of every implementation's `Exchange` and `Rotation`: where blocks are, when."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from lvxattn.common.layout import Layout
from lvxattn.common.masks import MaskView
from lvxattn.common.meter import Block, Meter
from lvxattn.common.pool import Kept
from lvxattn.common.wire import BLOCKS, NAMES, Field, Kind, nbytes


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
    wanted : str
        The arguments whose gradients this rank computes in a backward: of ``"qkv"``.
    """

    def __init__(self, layout: Layout, mask: Any, meter: Meter | None, wanted: str = "qkv") -> None:
        self.layout, self.mask, self.meter = layout, mask, meter or Meter()
        self.P, self.rank, self.scale = layout.size, layout.rank, layout.scale
        # What travels must be the same on all ranks; the rest is each rank's own affair.
        travels = gradients_sent(layout)
        self.wanted = "".join(x for x in layout.gradients if x in wanted or x in travels)
        self.rotations: list[Any] = []
        self.kept: list[Kept] = []

    def take(self, kind: Hashable, size: int, make: Callable[[int], Any]) -> Any:
        """Return a buffer from the layout's pool, of at least `size` bytes, until `give_back`."""
        self.kept.append(self.layout.pool.take(kind, size, make))
        return self.kept[-1].buffer

    def give_back(self) -> None:
        """Return all buffers to the layout's pool.  Nothing may be a view of them any more."""
        for kept in self.kept:
            self.layout.pool.give(kept)
        # Rotations refer to this exchange: a cycle would keep buffers until garbage collection.
        self.kept.clear()
        self.rotations.clear()

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

    def post(self) -> None:
        """Start the transfers whose blocks are here, in the order of their arrival.

        All ranks keep one order, by time and then by rotation: NCCL requires it, and with any
        transport a transfer then waits for none that comes after it.
        """
        while due := [
            (rotation.time(rotation.due[0]), i)
            for i, rotation in enumerate(self.rotations)
            if rotation.due
        ]:
            _, i = min(due)
            rotation = self.rotations[i]
            stop = rotation.due[0]
            legs = rotation.arriving[stop]
            if not all(leg.start in rotation.loaded for leg in legs):
                return
            # One block at a time: more would need as many buffers.
            if stop in rotation.comes and rotation.receiving:
                return
            rotation.due.pop(0)
            rotation.start(stop, legs)


def gradients_sent(layout: Layout) -> str:
    """Return the arguments whose gradients are sent, if anybody wants them."""
    if layout.way in NAMES:
        a, b = layout.shape
        return "q" * (a > 1) + "kv" * (b > 1)
    return {"ulysses": "qkv", "replicated keys": "kv"}.get(layout.way, "q")


class Leg(NamedTuple):
    """One block's way from one stop to the next, both counted in hops from its owner.

    Of its rows (queries, or keys) those travel that are needed at the stops to come or, in a
    result, were computed at the stops before; `whole` if these are all.
    """

    owner: int
    start: int
    stop: int
    rows: slice
    whole: bool


class RotationBase:
    """One kind of block travelling round the ring.

    A block stops where it meets something visible: without a `Rule`, on every rank.  Blocks set out
    from their owner, at hop 0; results from the first stop, and end at their owner, at hop `size`.

    Attributes
    ----------
    size : int
        Number of ranks of the ring: P, or those of a grid's column or row.
    comes, leaves : dict of Leg
        What arrives on this rank, by its stop, and what leaves it, by its start.
    arriving : dict of list of Leg
        The same legs that leave, by their stop; one that only comes has no leg there.
    due : list of int
        The stops of transfers that have not been started, in ascending order.
    loaded : dict
        Blocks that are ready to leave, by the start of their leg.
    receiving : dict
        Blocks that are under way to this rank, by the stop at which they arrive.
    """

    def __init__(self, layout: Layout, kind: Kind) -> None:
        self.layout, self.kind = layout, kind
        self.size = len(layout.ring(kind.side))
        self.comes: dict[int, Leg] = {}
        self.leaves: dict[int, Leg] = {}
        for hop in range(self.size + 1):
            owner = self.owner(hop)
            stops = layout.stops(kind.side, owner)
            way = (0, *stops) if kind.tag == BLOCKS else (*stops, self.size)
            if hop not in way or not kind.fields(layout, owner):
                continue
            at = way.index(hop)
            if at > 0:
                self.comes[hop] = self._leg(owner, way, at - 1)
            if at + 1 < len(way):
                self.leaves[hop] = self._leg(owner, way, at)
        self.due = sorted({*self.comes, *(leg.stop for leg in self.leaves.values())})
        self.arriving = {
            stop: [leg for leg in self.leaves.values() if leg.stop == stop] for stop in self.due
        }
        self.loaded: dict[int, Any] = {}
        self.receiving: dict[int, Any] = {}

    def _leg(self, owner: int, way: tuple[int, ...], at: int) -> Leg:
        layout, side = self.layout, self.kind.side
        length = (layout.s_kv if side == "keys" else layout.s_q)[owner]
        rows = slice(0, length)
        if layout.structures:
            stops = way[at + 1 :] if self.kind.tag == BLOCKS else way[: at + 1]
            rows_of = layout.stops(side, owner)
            needed = [rows_of[hop] for hop in stops]
            rows = slice(min(x.start for x in needed), max(x.stop for x in needed))
        return Leg(owner, way[at], way[at + 1], rows, rows == slice(0, length))

    def fields(self, leg: Leg) -> list[Field]:
        """Return the arrays that travel."""
        fields = self.kind.fields(self.layout, leg.owner)
        if leg.whole:
            return fields
        s = leg.rows.stop - leg.rows.start
        return [Field((*x.shape[:2], s, *x.shape[3:]), x.dtype) for x in fields]

    def nbytes(self, leg: Leg) -> int:
        """Return the number of bytes that travel."""
        return nbytes(self.fields(leg))

    def owner(self, hop: int) -> int:
        """Return the owner of the block that is here after `hop` hops."""
        return self.layout.owner(hop, self.kind.side)

    def source(self, leg: Leg) -> int:
        """Return the rank from which a block comes here."""
        return self.owner(leg.stop - leg.start)

    def dest(self, leg: Leg) -> int:
        """Return the rank to which a block leaves from here."""
        return self.owner(leg.start - leg.stop)

    def time(self, stop: int) -> int:
        """Return a number by which all transfers of a pass are in the order of the schedule.

        Queries and keys set out together; the next keys are passed on when all queries have come;
        results for queries set out while the last keys are here, and theirs end the pass.
        """
        a, b = self.layout.shape
        last = a + b - 3  # that of the last keys
        if self.kind.side == "queries":
            return stop if self.kind.tag == BLOCKS or b == 1 else last + stop
        if self.kind.tag != BLOCKS and stop == b:
            return last + a
        return 1 if stop == 1 else a - 2 + stop

    def awaited(self, leg: Leg) -> Block:
        """Return the block that comes here."""
        return Block(self.kind.name, leg.owner, leg.stop, source=self.source(leg))

    def leaving(self, leg: Leg) -> Block:
        """Return the block that leaves from here."""
        return Block(self.kind.name, leg.owner, leg.stop, dest=self.dest(leg))

    def filled_in(self, rows: list[Any], leg: Leg, full: Callable[..., Any]) -> list[Any]:
        """Return the arrays of a block, given the rows of them that have travelled.

        ``full(shape, value, like)`` returns an array of one value.
        """
        if leg.whole:
            return rows
        arrays = []
        fields = self.kind.fields(self.layout, leg.owner)
        for x, field, fill in zip(rows, fields, self.kind.fill, strict=False):
            arrays.append(full(field.shape, fill, x))
            arrays[-1][:, :, leg.rows] = x
        return arrays


class BufferedRotation(RotationBase, ABC):
    """A rotation whose transfers take place beside the work, from buffers and into them.

    Attributes
    ----------
    exchange : Exchange
    buffers : list
        The current block's and the next one's; more only where blocks that skip ranks wait for
        their turn to leave, and none on a rank that no block comes to or leaves.
    here : buffer or None
        The buffer of the block received last.
    arrays : list of array
        That block.
    sending : dict of Leg
        The legs of blocks that are under way from this rank, by buffer.
    """

    def __init__(self, exchange: Any, kind: Kind) -> None:
        super().__init__(exchange.layout, kind)
        self.exchange = exchange
        self.buffers: list[Any] = []
        self.here: Any = None
        self.arrays: list[Any] = []
        self.sending: dict[Any, Leg] = {}

    @abstractmethod
    def _allocate(self) -> Any:
        """Add a buffer for the largest block, and return it."""

    @abstractmethod
    def _load(self, held: Any, leg: Leg, arrays: Sequence[Any]) -> None:
        """Copy a block that is to leave into a buffer."""

    @abstractmethod
    def wait_sent(self, held: Any) -> None:
        """Wait until the last send from a buffer is complete."""

    def send(self, *arrays: Any, hop: int) -> None:
        """Send the block that is here at a hop to its next stop, if it has one."""
        if (leg := self.leaves.get(hop)) is not None:
            # Over the block received, which has been used; a first stop has received none.
            held = self.here if hop in self.comes and self.here else self._free()
            self.here = None
            self._load(held, leg, arrays)
        self.exchange.post()

    def pass_on(self, hop: int) -> None:
        """Send the block received at a hop to its next stop, if it has one."""
        if (leg := self.leaves.get(hop)) is not None:
            if leg.rows == self.comes[hop].rows:
                self.loaded[hop] = self.here
            else:
                self._load(self._free(), leg, self.arrays)
        self.exchange.post()

    def _free(self) -> Any:
        """Return a buffer that may be written to; the one whose block has left first."""
        busy = [self.here, *self.loaded.values(), *self.receiving.values()]
        idle = [held for held in self.buffers if held not in busy] or [self._allocate()]
        held = min(idle, key=lambda held: self.sending[held].stop if held in self.sending else 0)
        self.wait_sent(held)
        return held
