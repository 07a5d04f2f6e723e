"""Simulate the time of a pass: every rank's steps on a machine's clocks.

A message is copied into a buffer, leaves when its link is free, takes its size over the bandwidth,
and arrives one latency later; the ranks of a host share its link to the others.  Computation on
other blocks hides it as far as the schedule and the link (`Link.busy`) allow.
"""

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass, replace

from lvxattn.common.layout import Layout
from lvxattn.common.wire import ITEMSIZE
from lvxattn.plan.machine import Machine
from lvxattn.plan.steps import Compute, Fill, Join, Send, Step, Wait, steps

MANY_RANKS, _ROWS = 32, 16
"""Of more ranks, those whose shares have as many rows are taken as alike in spite of one more."""


@dataclass(frozen=True)
class Played:
    """The times of a simulated pass.

    Attributes
    ----------
    seconds : float
        From the common start to the end of the slowest rank.
    computing, waiting : float
        Of the slowest rank.
    """

    seconds: float
    computing: float
    waiting: float


def play(layout: Layout, machine: Machine, *, backward: bool = False) -> Played:
    """Simulate a pass.  Not collective.

    Parameters
    ----------
    layout : Layout
    machine : Machine
        Ranks fill its hosts in the order of the ring.
    backward : bool

    Returns
    -------
    Played
        Of more than 32 ranks without masks, shares of 16 rows or more that differ by one count
        as equally long.

    Examples
    --------
    >>> from lvxattn.plan import MACHINES, planned
    >>> layout = planned((1, 32, 2048, 128), (1, 8, 1_000_000, 128), P=16)
    >>> played = play(layout, MACHINES["a100-16"])
    >>> round(played.seconds, 3)
    0.012
    """
    layout = _evened(layout)
    return _play(layout, machine, backward, _unlike(layout, machine))


def _evened(layout: Layout) -> Layout:
    """Return the layout of many ranks with equal shares, if these differ by one row.

    Ranks that differ must all be simulated, which takes the square of their number.
    """
    if layout.size <= MANY_RANKS or layout.structures or any(layout.masks):
        return layout
    s_q, s_kv = (
        (max(s),) * layout.size if max(s) - min(s) == 1 and min(s) >= _ROWS else s
        for s in (layout.s_q, layout.s_kv)
    )
    return replace(layout, s_q=s_q, s_kv=s_kv)


def _unlike(layout: Layout, machine: Machine) -> int:
    """Return how many of the ranks to simulate, first in the order; all others do as these do.

    Where shares are equal, hosts are full, and rings inside hosts fill them or are filled by them,
    one host's ranks do what any other's do at the same time.
    """
    P, per_host, (_, n) = layout.size, machine.ranks_per_host, layout.inside
    shares = {*zip(layout.s_q, layout.s_kv, layout.masks, strict=True)}
    # Replicated sides are cut by rows, of which some ranks may have one more.
    regular = len(shares) == 1 and not layout.structures and layout.way == layout.schedule
    regular = regular and P % per_host == 0
    return per_host if regular and 0 in (n % per_host, per_host % n) else P


def _play(layout: Layout, machine: Machine, backward: bool, count: int) -> Played:
    """Simulate the first `count` ranks in the order; messages of others are those of their like."""
    P, per_host, (_, n) = layout.size, machine.ranks_per_host, layout.inside
    place = {rank: at for at, rank in enumerate(layout.order)}

    def way(source: int, dest: int, kind: str) -> tuple[int, int, int, str]:
        """Return what tells the messages apart that ranks like `dest` wait for."""
        apart = (dest - source) % n, (dest // n - source // n) % (P // n)
        return *apart, dest % count, kind

    todo = [deque(steps(layout, rank, backward=backward)) for rank in layout.order[:count]]
    clock, computing = [0.0] * count, [0.0] * count
    free: dict[tuple[str, int], float] = defaultdict(float)
    # Of each message, when it arrives, and for how long its receiver is busy with it.
    mail: dict[tuple[int, int, int, str], deque[tuple[float, float]]] = defaultdict(deque)
    ready = [(machine.call, at) for at in range(count)]
    asleep: dict[tuple[int, int, int, str], float] = {}  # since when, by the message awaited
    while ready:  # the rank whose clock is furthest behind is next: links are used in time order
        now, at = heapq.heappop(ready)
        if not todo[at]:
            clock[at] = now
            continue
        step: Step = todo[at][0]
        if isinstance(step, Send | Wait):
            handling = machine.message_at_once if step.at_once else machine.message
        if isinstance(step, Send):
            now += handling + step.packed * step.nbytes / machine.copy
            dest = place[step.dest]
            # The ring visits ranks host by host, however they were placed.
            apart = at // per_host != dest // per_host
            link = machine.between if apart else machine.inside
            lane = ("host", at // per_host) if apart else ("rank", at)
            took = step.nbytes / link.bandwidth
            free[lane] = max(now, free[lane]) + took
            to = way(at, dest, step.kind)
            mail[to].append((free[lane] + link.latency, took * link.busy))
            if to in asleep:
                heapq.heappush(ready, (asleep.pop(to), dest % count))
        elif isinstance(step, Compute | Fill | Join):
            took = cost(step, layout, machine, backward=backward)
            computing[at] += took
            now += took
        else:
            to = way(place[step.source], at, step.kind)
            if not mail[to]:
                asleep[to] = now
                continue
            arrives, busy = mail[to].popleft()
            unpacking = step.unpacked / (machine.copy_new or machine.copy)
            now = max(now + busy, arrives) + handling + unpacking
        todo[at].popleft()
        heapq.heappush(ready, (now, at))
    last = max(range(count), key=lambda at: clock[at])
    return Played(clock[last], computing[last], clock[last] - computing[last])


def cost(step: Compute | Fill | Join, layout: Layout, machine: Machine, *, backward: bool) -> float:
    """Return the seconds that a step takes a rank.

    Parameters
    ----------
    step : Compute, Fill or Join
    layout : Layout
    machine : Machine
    backward : bool

    Returns
    -------
    float
    """
    if isinstance(step, Fill):
        return step.nbytes / (machine.copy_new or machine.copy)
    if isinstance(step, Join):
        return step.nbytes / machine.copy
    pairs = layout.B * layout.H * step.heads * step.s_q * step.s_kv
    if not pairs:
        return 0.0
    # q k^T and p v; in the backward q k^T, dout v^T, and the products for dq, dk and dv.
    size = 3 * layout.D + 2 * layout.D_V if backward else layout.D + layout.D_V
    row = layout.B * layout.H_KV * step.heads * (layout.D + layout.D_V) * ITEMSIZE[layout.dtype]
    memory = (backward and machine.memory_backward) or machine.memory
    matmul = (backward and machine.matmul_backward) or machine.matmul
    reading = step.s_kv * row * (1 + 2 * backward) / memory
    arithmetic = 2 * pairs * size / matmul
    short, long = sorted((arithmetic, reading))
    return long + (1 - machine.hiding) * short + machine.start
