"""Choose a schedule: the fewest bytes or, on a known machine, the least time.

A forward and a backward pass count together.  A schedule that does not support the problem is not
chosen: ulysses where P does not divide H_KV, and those with which keys travel where a mask is a
callable, because ranks may have different ones.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from lvxattn.common import layout as common
from lvxattn.common.free_memory import judge
from lvxattn.common.handshake import AUTO, MASKS_TRAVEL, SCHEDULES, Record
from lvxattn.plan.machine import Machine
from lvxattn.plan.memory import call_memory
from lvxattn.plan.simulate import MANY_RANKS, play
from lvxattn.plan.steps import messages

L = TypeVar("L", bound=common.Layout)

CHANGE = "use more hosts, or fewer ranks on this one"


class Layout(common.Layout):
    """The layout that ranks agree on, with ``schedule="auto"`` resolved to the best schedule.

    Attributes and methods are those of `lvxattn.common.layout.Layout`.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import Layout, run_ranks
    >>> def schedule(comm):
    ...     q, k = np.ones((1, 2, 4, 8)), np.ones((1, 2, 500, 8))
    ...     return Layout.agree(q, k, k, comm, schedule="auto").schedule
    >>> run_ranks(3, schedule)
    ['lv-xattn', 'lv-xattn', 'lv-xattn']
    """

    @classmethod
    def of(cls, records: list[Record], rank: int) -> Self:
        """Return the layout that follows from all ranks' records, as `rank` sees it.

        Raises
        ------
        MemoryError
            A host's ranks need more memory for the call than it has free; the same on all ranks.
        """
        layout = super().of(records, rank)
        if layout.schedule == AUTO:
            best = Candidate(SCHEDULES[0], 0, 0, None, "")  # no schedule moves what is replicated
            if layout.way == layout.schedule:
                best = candidates(layout, layout.machine)[0]
            layout = replace(layout, schedule=best.schedule, grid=best.grid)
        elif layout.way == "grid" and layout.grid is None:
            layout = with_grid(layout, layout.machine)
        if any(r.free is not None for r in records):
            backward = records[0].call == "backward"
            needs = call_memory(layout, backward=backward)
            judge([r.host for r in records], needs, [r.free for r in records], CHANGE)
        return layout


@dataclass(frozen=True)
class Candidate:
    """The cost of one schedule, forward and backward.

    Attributes
    ----------
    schedule : str
    messages, nbytes : int
        Of the rank that sends most.
    seconds : float or None
        None without a machine.
    refused : str
        Why the schedule cannot be used; empty if it can.
    grid : (int, int) or None
        Of ``"grid"``.
    """

    schedule: str
    messages: int
    nbytes: int
    seconds: float | None
    refused: str
    grid: tuple[int, int] | None = None


def candidates(layout: common.Layout, machine: Machine | None = None) -> list[Candidate]:
    """Return the cost of every schedule, best first.  Not collective.

    Parameters
    ----------
    layout : Layout
        Its own schedule is ignored.
    machine : Machine, optional
        Without one, seconds are None and candidates are sorted by bytes, then messages.

    Returns
    -------
    list of Candidate

    Examples
    --------
    A few text tokens attend to a long video:

    >>> from lvxattn.plan import planned
    >>> layout = planned((1, 8, 64, 64), (1, 8, 65536, 64), P=4)
    >>> [(c.schedule, c.nbytes) for c in candidates(layout)][:2]
    [('lv-xattn', 350208), ('grid', 350208)]
    """
    found = []
    for schedule in SCHEDULES:
        of = replace(layout, schedule=schedule, grid=None)
        if refused := refusal(of):
            found.append(Candidate(schedule, 0, 0, None, refused))
        else:
            of = with_grid(of, machine) if schedule == "grid" else of
            found.append(_candidate(of, machine))
    return sorted(found, key=_cost)


def with_grid(layout: L, machine: Machine | None = None) -> L:
    """Return a layout of ``"grid"`` with the numbers that cost least.  Not collective.

    Parameters
    ----------
    layout, machine
        As given to `candidates`.

    Returns
    -------
    Layout
        Of all pairs whose product is P, the ends, lv-xattn and ring, among them.  Ragged shares are
        compared as if all were as long as the longest.  Of more than 32 ranks, the time of those
        four is compared that send the fewest bytes.

    Examples
    --------
    >>> from lvxattn.plan import planned
    >>> square = planned((1, 8, 4096, 64), (1, 8, 8192, 64), P=16)
    >>> with_grid(replace(square, schedule="grid")).grid
    (8, 2)
    """
    P, layout = layout.size, on_hosts(layout, machine)
    even = layout
    if not layout.structures:  # of ranks that are alike one stands for all
        s_kv = max(layout.s_kv)
        masks = (layout.masks[layout.s_kv.index(s_kv)],) * P
        even = replace(layout, s_q=(max(layout.s_q),) * P, s_kv=(s_kv,) * P, masks=masks)
    every = [
        replace(even, schedule="grid", grid=(a, P // a)) for a in range(P, 0, -1) if P % a == 0
    ]
    if machine is not None and P > MANY_RANKS:
        every = sorted(every, key=lambda of: _candidate(of, None).nbytes)[:4]
    best = min(every, key=lambda of: _cost(_candidate(of, machine)))
    return replace(layout, schedule="grid", grid=best.grid)


def on_hosts(layout: L, machine: Machine | None) -> L:
    """Return a layout with a machine's hosts, if it has none."""
    if machine is None or layout.hosts:
        return layout
    places = (layout.order.index(rank) // machine.ranks_per_host for rank in range(layout.size))
    return replace(layout, hosts=tuple(f"host {at}" for at in places))


def _cost(c: Candidate) -> tuple[bool, float, int]:
    return bool(c.refused), c.nbytes if c.seconds is None else c.seconds, c.messages


def explain(layout: common.Layout) -> str:
    """Format the cost of every schedule on a layout's lengths, best first.  Not collective.

    Parameters
    ----------
    layout : Layout
        Its machine, if it has one, adds seconds.

    Returns
    -------
    str
        A table: messages and bytes of the rank that sends most, and seconds, forward and backward
        together; and why a schedule cannot be used.

    Examples
    --------
    >>> from lvxattn.plan import planned
    >>> print(explain(planned((1, 6, 64, 64), (1, 6, 65536, 64), P=4, dtype="float32")))
    lv-xattn is taken
    schedule    messages             bytes     seconds
    lv-xattn          12           373,248
    grid 4x1          12           373,248
    gather            12           373,248
    ring               9       452,984,832
    ulysses     cannot be taken: P = 4 does not divide H_KV = 6
    """
    if layout.way != layout.schedule:
        what = "queries" if layout.queries == "replicated" else "keys"
        return f"{what} are replicated: no schedule moves them"
    lines = [
        f"{named(layout.schedule, layout.grid)} is taken",
        f"{'schedule':10}{'messages':>10}{'bytes':>18}{'seconds':>12}",
    ]
    found = candidates(layout, layout.machine)
    if layout.grid not in (None, *(c.grid for c in found)):
        found = sorted([*found, _candidate(layout, layout.machine)], key=_cost)
    for c in found:
        if c.refused:
            lines.append(f"{c.schedule:10}  cannot be taken: {c.refused}")
            continue
        seconds = "" if c.seconds is None else f"{c.seconds:.6f}"
        name = named(c.schedule, c.grid)
        lines.append(f"{name:10}{c.messages:>10,}{c.nbytes:>18,}{seconds:>12}".rstrip())
    return "\n".join(lines)


def named(schedule: str, grid: tuple[int, int] | None) -> str:
    """Return a schedule's name, with the numbers of a grid."""
    return schedule if grid is None else f"{schedule} {grid[0]}x{grid[1]}"


def _candidate(layout: common.Layout, machine: Machine | None) -> Candidate:
    by_rank = [
        messages(layout, rank) + messages(layout, rank, backward=True)
        for rank in unlike_ranks(layout)
    ]
    seconds = None
    if machine is not None:
        seconds = sum(play(layout, machine, backward=b).seconds for b in (False, True))
    nbytes = max(sum(message.nbytes for message in sent) for sent in by_rank)
    return Candidate(layout.schedule, max(map(len, by_rank)), nbytes, seconds, "", layout.grid)


def unlike_ranks(layout: common.Layout) -> list[int]:
    """Return one rank of each kind; every other rank sends as much as one of these.

    A block is passed on by all ranks of its ring but its owner's left neighbour, where it ends, and
    a result by all but its owner.  So what a rank sends follows from its own share, its right
    neighbours' and those of its rings, but for masks that are a `Rule`, where it depends on what is
    visible.

    Parameters
    ----------
    layout : Layout

    Returns
    -------
    list of int
    """
    if layout.structures:
        return list(layout.order)
    shares = list(zip(layout.s_q, layout.s_kv, layout.masks, strict=True))
    kinds: dict[object, int] = {}
    for rank in layout.order:
        rings = [layout.ring(side, rank) for side in ("queries", "keys")]
        right = [shares[ring[(ring.index(rank) + 1) % len(ring)]] for ring in rings]
        all_of = [frozenset(Counter(shares[r] for r in ring).items()) for ring in rings]
        kinds.setdefault((shares[rank], *right, *all_of), rank)
    return list(kinds.values())


def refusal(layout: common.Layout) -> str:
    """Return why the layout's schedule does not support it; empty if it does.

    Parameters
    ----------
    layout : Layout

    Returns
    -------
    str
    """
    if layout.schedule == "ulysses" and layout.H_KV % layout.size:
        return f"P = {layout.size} does not divide H_KV = {layout.H_KV}"
    one_rule = layout.structures and all(x == layout.structures[0] for x in layout.structures)
    if layout.schedule in MASKS_TRAVEL and any(layout.rules) and not one_rule:
        return "a mask is a callable, and ranks may have different ones"
    return ""
