"""Simulate the time of a pass: every rank's steps on a machine's clocks.

A message is copied into a buffer, leaves when its link is free, takes its size over the bandwidth,
and arrives one latency later; the ranks of a host share its link to the others.  Computation on
other blocks hides it as far as the schedule allows.
"""

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass

from lvxattn.common.layout import Layout
from lvxattn.common.wire import ITEMSIZE
from lvxattn.plan.machine import Machine
from lvxattn.plan.steps import Compute, Fill, Join, Send, Step, steps


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

    Examples
    --------
    >>> from lvxattn.plan import MACHINES, planned
    >>> layout = planned((1, 32, 2048, 128), (1, 8, 1_000_000, 128), P=16)
    >>> played = play(layout, MACHINES["a100-16"])
    >>> round(played.seconds, 3)
    0.012
    """
    P = layout.size
    # The ring visits ranks host by host, however they were placed.
    host = [layout.order.index(rank) // machine.ranks_per_host for rank in range(P)]
    todo = [deque(steps(layout, rank, backward=backward)) for rank in range(P)]
    clock, computing = [0.0] * P, [0.0] * P
    free: dict[tuple[str, int], float] = defaultdict(float)
    mail: dict[tuple[int, int, str], deque[float]] = defaultdict(deque)
    ready = [(machine.call, rank) for rank in range(P)]
    asleep: dict[tuple[int, int, str], float] = {}  # since when, by the message awaited
    while ready:  # the rank whose clock is furthest behind is next: links are used in time order
        now, rank = heapq.heappop(ready)
        if not todo[rank]:
            clock[rank] = now
            continue
        step: Step = todo[rank][0]
        if isinstance(step, Send):
            now += step.packed * step.nbytes / machine.copy
            apart = host[rank] != host[step.dest]
            link = machine.between if apart else machine.inside
            lane = ("host", host[rank]) if apart else ("rank", rank)
            free[lane] = max(now, free[lane]) + step.nbytes / link.bandwidth
            way = rank, step.dest, step.kind
            mail[way].append(free[lane] + link.latency)
            if way in asleep:
                heapq.heappush(ready, (asleep.pop(way), step.dest))
        elif isinstance(step, Compute | Fill | Join):
            took = cost(step, layout, machine, backward=backward)
            computing[rank] += took
            now += took
        else:
            way = step.source, rank, step.kind
            if not mail[way]:
                asleep[way] = now
                continue
            now = max(now, mail[way].popleft()) + step.unpacked / machine.copy
        todo[rank].popleft()
        heapq.heappush(ready, (now, rank))
    last = max(range(P), key=lambda rank: clock[rank])
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
    if isinstance(step, Fill | Join):
        return step.nbytes / machine.copy
    pairs = layout.B * layout.H * step.heads * step.s_q * step.s_kv
    if not pairs:
        return 0.0
    # q k^T and p v; in the backward q k^T, dout v^T, and the products for dq, dk and dv.
    size = 3 * layout.D + 2 * layout.D_V if backward else layout.D + layout.D_V
    row = layout.B * layout.H_KV * step.heads * (layout.D + layout.D_V) * ITEMSIZE[layout.dtype]
    reading = step.s_kv * row * (1 + 2 * backward) / machine.memory
    arithmetic = 2 * pairs * size / machine.matmul
    short, long = sorted((arithmetic, reading))
    return long + (1 - machine.hiding) * short + machine.start
