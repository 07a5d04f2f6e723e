"""Write a trace for ui.perfetto.dev and chrome://tracing: a process per rank, arrows for blocks.

    process     rank
    threads     computing, sending, waiting; sending more than once where blocks are under way at
                the same time and neither outlasts the other
    slices      spans of a rank; sending lasts until the sender's wait for completion ends
    arrows      from the sending of a block to the end of the wait for it; where it goes round the
                ring, hop by hop as one flow; none for empty blocks, for which no rank waits
    instants    the begin of a pass

The format is Chrome's "Trace Event Format"; its times are in microseconds.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lvxattn.common.meter import Block
from lvxattn.common.new_file import write_file
from lvxattn.common.timeline import Span
from lvxattn.plan.trace import Trace, Trip

Event = dict[str, Any]

COMPUTING, SENDING, WAITING = 1, 2, 3
# Further lanes of sending are threads from this number.
_MORE = 10


def write_trace(
    trace: Trace, path: str, hosts: Sequence[str], notes: dict[str, Any] | None = None
) -> None:
    """Write a trace as JSON.  Not collective.

    Parameters
    ----------
    trace : Trace
    path : str
    hosts : sequence of str
        Every rank's.
    notes : dict, optional
        Further entries of the file's ``otherData``.

    Raises
    ------
    OSError
        The file cannot be written; it names the file, which is as it was before.
    """
    document = {
        "traceEvents": events(trace, hosts),
        "displayTimeUnit": "ms",
        "otherData": {
            **(notes or {}),
            "clock accuracy of each rank, in microseconds": [1e6 * x for x in trace.accuracy],
        },
    }
    write_file(path, json.dumps(document) + "\n")


def events(trace: Trace, hosts: Sequence[str]) -> list[Event]:
    """Return the events of a trace: first the names, then the others in order of time.

    Parameters
    ----------
    trace : Trace
    hosts : sequence of str
        Every rank's.

    Returns
    -------
    list of dict
    """
    names: list[Event] = []
    slices: list[Event] = []
    threads: dict[Trip, int] = {}
    for rank, host in enumerate(hosts):
        sent = trace.sent_by(rank)
        threads |= {trip: SENDING if lane == 0 else _MORE + lane for trip, lane in sent}
        names += _names(rank, host, max((lane for _, lane in sent), default=0))
        slices += _slices(trace, rank)
    slices += [_sending(trip, threads[trip]) for trip in trace.trips]
    mark = {"ph": "i", "s": "p", "tid": COMPUTING}
    marks = [
        {**mark, "name": f"{name} begins", "pid": rank, "ts": _us(at)}
        for rank, passes in enumerate(trace.passes)
        for name, at in passes
    ]
    # Of simultaneous events, arrows come last: the slices that they are bound to must have begun.
    timed = [*sorted(slices, key=lambda e: -e["dur"]), *marks, *_arrows(trace, threads)]
    return names + sorted(timed, key=lambda event: float(event["ts"]))


def _names(rank: int, host: str, lanes_more: int) -> Iterator[Event]:
    def name(what: str, tid: int, **args: Any) -> Event:
        return {"ph": "M", "name": what, "pid": rank, "tid": tid, "ts": 0, "args": args}

    yield name("process_name", 0, name=f"rank {rank} on {host}")
    yield name("process_sort_index", 0, sort_index=rank)
    more = [_MORE + lane for lane in range(1, lanes_more + 1)]
    order = [COMPUTING, SENDING, *more, WAITING]
    titles = ["computing", "sending", *(["sending"] * lanes_more), "waiting"]
    for place, (tid, title) in enumerate(zip(order, titles, strict=True)):
        yield name("thread_name", tid, name=title)
        yield name("thread_sort_index", tid, sort_index=place)


def _slices(trace: Trace, rank: int) -> Iterator[Event]:
    for start, end, block in trace.computed[rank]:
        yield _slice(f"compute with {block.name}", (rank, COMPUTING), start, end, block)
    for start, end, block in trace.waited[rank]:
        yield _slice(f"wait for {block}", (rank, WAITING), start, end, block)


def _sending(trip: Trip, tid: int) -> Event:
    more = {"bytes": trip.nbytes, "to": trip.dest}
    name = f"send {trip.block.name}"
    return _slice(name, (trip.source, tid), trip.posted, trip.gone, trip.block, **more)


def _slice(
    name: str, where: tuple[int, int], start: float, end: float, block: Block, **more: Any
) -> Event:
    pid, tid = where
    args = {"hop": block.hop, "owner": block.whose, "from": block.source, **more}
    return {
        "ph": "X",
        "name": name,
        "cat": "attention",
        "pid": pid,
        "tid": tid,
        "ts": _us(start),
        "dur": (_ns(end) - _ns(start)) / 1000,
        "args": {key: value for key, value in args.items() if value is not None},
    }


def _arrows(trace: Trace, threads: dict[Trip, int]) -> Iterator[Event]:
    """Yield the arrows: one flow per block that goes round the ring, one per other message."""
    flows: dict[tuple[Any, ...], list[tuple[Trip, Span]]] = defaultdict(list)
    for trip in trace.trips:
        if trip.taken and trip.nbytes:
            ends = () if trip.block.hop else (trip.source, trip.dest)
            flow = flows[trip.block.kind, trip.block.owner, trip.turn, *ends]
            flow.append((trip, trip.taken))
    for number, flow in enumerate(flows.values(), start=1):
        points: list[tuple[int, int, float]] = []
        for trip, taken in sorted(flow, key=lambda leg: leg[0].block.hop):
            points.append((trip.source, threads[trip], _us(trip.posted)))
            # A nanosecond before the wait ends, so that it is still open, but not before it begins.
            points.append((trip.dest, WAITING, max(_ns(taken.start), _ns(taken.end) - 1) / 1000))
        name = flow[0][0].block.name
        for place, (pid, tid, ts) in enumerate(points):
            phase = "s" if place == 0 else "f" if place == len(points) - 1 else "t"
            event = {"ph": phase, "name": name, "cat": "block", "id": number}
            bound = {"bp": "e"} if phase == "f" else {}
            yield {**event, **bound, "pid": pid, "tid": tid, "ts": ts}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _us(seconds: float) -> float:
    return _ns(seconds) / 1000
