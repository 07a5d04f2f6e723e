"""Check that a file is a valid trace for Perfetto and chrome://tracing, independently."""

from collections import defaultdict
from typing import Any

THREADS = {"computing", "sending", "waiting"}
Slice = tuple[float, float]


def check_trace(document: dict[str, Any], P: int) -> dict[Any, list[dict[str, Any]]]:
    """Check a trace of P ranks; return the events of every flow, in order.

    An arrow may go back in time by no more than the clocks of its ends may be wrong.
    """
    assert document["displayTimeUnit"] in ("ms", "ns")
    (accuracy,) = (x for name, x in document["otherData"].items() if name.startswith("clock"))
    assert len(accuracy) == P
    events = document["traceEvents"]
    assert {event["ph"] for event in events} <= set("MXistf")
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        assert event["name"]
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert not times or times[0] >= 0
    _check_names(events, P)
    slices = _slices(events)
    flows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event)
    for flow in flows.values():
        # In the order of the file they are in that of time: so take each as the sender tells it.
        assert [event["ph"] for event in flow].count("s") == 1
        assert [event["ph"] for event in flow].count("f") == 1
        assert len({event["name"] for event in flow}) == 1
        late = max(accuracy) * 2
        start, end = (next(e for e in flow if e["ph"] == ph) for ph in "sf")
        assert all(start["ts"] - late <= event["ts"] <= end["ts"] + late for event in flow)
        assert start["ts"] <= end["ts"] + accuracy[start["pid"]] + accuracy[end["pid"]]
        for event in flow:
            here = slices[event["pid"], event["tid"]]
            # Half a nanosecond is lost in writing microseconds.
            assert any(a - 1e-3 <= event["ts"] <= b + 1e-3 for a, b in here), event
    return flows


def _check_names(events: list[dict[str, Any]], P: int) -> None:
    processes, threads = {}, defaultdict(dict)
    for event in events:
        if event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event["name"] == "thread_name":
            threads[event["pid"]][event["tid"]] = event["args"]["name"]
    assert sorted(processes) == list(range(P))
    for pid, name in processes.items():
        assert name.startswith(f"rank {pid} on ")
        assert set(threads[pid].values()) == THREADS
    for event in events:
        if event["ph"] != "M":
            assert event["tid"] in threads[event["pid"]]


def _slices(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[Slice]]:
    """Return every thread's slices, which must lie apart or one within the other."""
    found: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    open_ends: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            where, start = (event["pid"], event["tid"]), event["ts"]
            end = start + event["dur"]
            while open_ends[where] and open_ends[where][-1] <= start + 1e-4:
                open_ends[where].pop()
            assert not open_ends[where] or end <= open_ends[where][-1] + 1e-4, event
            open_ends[where].append(end)
            found[where].append((start, end))
    return found
