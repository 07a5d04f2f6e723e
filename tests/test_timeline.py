"""Timelines and traces: all that was done is there, and every block can be followed."""

import json
from argparse import Namespace
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.cli import run_trace
from lvxattn.common.meter import Block, Meter
from lvxattn.common.timeline import Post, Span, Timeline
from lvxattn.common.wire import NAMES
from lvxattn.draw import picture
from lvxattn.mpi_impl.__main__ import main
from lvxattn.plan.steps import messages
from lvxattn.plan.trace import Clock, Overlap, Trace, lanes
from lvxattn.plan.trace_file import events, write_trace
from tests.cases import WAYS, Case, options_of
from tests.commands import Said, commands
from tests.traces import check_trace

P = 4
SMALL = ["run", "--text-tokens", "19", "--visual-tokens", "100", "--heads", "6", "--head-dim", "8"]
WORLDS = [
    pytest.param("mpi_impl", ("lv-xattn", "gather"), marks=pytest.mark.mpi),
    pytest.param("torch_impl", ("ring", "ulysses"), marks=pytest.mark.mpi),
]


def timelines(kind: str) -> tuple[Any, list[Timeline]]:
    """Do a forward and a backward pass, twice; the ring is not in rank order."""
    problem = Case("traced", mask="full", cut="ragged", S_Q=20).on(kind, P).make()

    def fn(comm: reference.VirtualComm) -> tuple[Any, Timeline]:
        part, timeline = problem.part(comm.rank, P, kind), Timeline()
        given: Any = part["q"], part["k"], part["v"]
        options: Any = {"mask": part["mask"], **options_of(kind, P)}
        layout = reference.Layout.agree(*given, comm, **options)
        options |= {"layout": layout, "meter": timeline}
        for _ in range(2):
            timeline.begins("forward")
            out, lse = reference.cross_attention(*given, comm, **options)
            timeline.begins("backward")
            reference.cross_attention_backward(part["dout"], *given, out, lse, comm, **options)
        return layout, timeline

    found = reference.run_ranks(P, fn, hosts=["a", "b", "a", "b"])
    return found[0][0], [timeline for _, timeline in found]


@pytest.mark.parametrize("kind", WAYS)
class TestVirtualRanks:
    def test_timeline_has_all_planned_messages(self, kind: str) -> None:
        layout, found = timelines(kind)
        for rank, timeline in enumerate(found):
            planned = [m for b in (False, True) for m in messages(layout, rank, backward=b)] * 2
            sent = Counter((post.dest, post.nbytes) for post in timeline.posted)
            assert sent == Counter((message.dest, message.nbytes) for message in planned)
            assert timeline.messages == len(timeline.posted)
            assert timeline.bytes == sum(post.nbytes for post in timeline.posted)

    def test_spans_sum_to_the_meter(self, kind: str) -> None:
        _, found = timelines(kind)
        for timeline in found:
            for spans, total in (
                (timeline.computed, timeline.computing),
                (timeline.waited, timeline.waiting),
            ):
                assert sum(span.end - span.start for span in spans) == pytest.approx(total)
                assert spans == sorted(spans, key=lambda span: span.start)
            assert [name for name, _ in timeline.passes] == ["forward", "backward"] * 2

    def test_blocks_arrive_after_they_are_sent(self, kind: str) -> None:
        trace = Trace.of(timelines(kind)[1])
        assert trace.trips
        for trip in trace.trips:
            assert trip.taken is not None
            assert trip.posted < trip.taken.end
            assert trip.taken.block[:3] == trip.block[:3]
            assert trip.taken in trace.waited[trip.dest]
        # No two of them between the same ranks end in one wait: there each is waited for alone.
        taken = Counter((trip.dest, trip.taken) for trip in trace.trips)
        assert set(taken.values()) == {1}

    def test_trace_file_is_valid(self, kind: str, tmp_path: Path) -> None:
        trace = Trace.of(timelines(kind)[1])
        write_trace(trace, str(tmp_path / "trace"), ["a", "b", "a", "b"], {"more": 1})
        document = json.loads((tmp_path / "trace").read_text())
        assert document["otherData"]["more"] == 1
        flows = check_trace(document, P)
        arrows = sum(len(flow) // 2 for flow in flows.values())
        assert arrows == sum(trip.nbytes > 0 for trip in trace.trips) > 0


@pytest.mark.parametrize("schedule", ["lv-xattn", "ring"])
def test_arrows_follow_blocks_around_the_ring(schedule: str, tmp_path: Path) -> None:
    layout, found = timelines(schedule)
    write_trace(Trace.of(found), str(tmp_path / "trace"), ["here"] * P)
    flows = check_trace(json.loads((tmp_path / "trace").read_text()), P)
    ways = Counter((flow[0]["name"], tuple(e["pid"] for e in flow)) for flow in flows.values())
    there, back = NAMES[schedule]
    # lv-xattn's results come home in both passes, the gradients of ring's keys in the backward.
    often = {there: 4, back: 4 if schedule == "lv-xattn" else 2}
    wanted: Counter[Any] = Counter()
    lengths = layout.s_q if schedule == "lv-xattn" else layout.s_kv
    for at, owner in enumerate(layout.order):
        if not lengths[owner]:
            continue
        ring = [layout.order[(at + hop) % P] for hop in range(P + 1)]
        for kind, stops in ((there, ring[:P]), (back, ring[1:])):
            way = [rank for pair in pairwise(stops) for rank in pair]
            wanted[kind.format(owner), tuple(way)] = often[kind]
    assert ways == wanted


def test_block_names() -> None:
    _, found = timelines("lv-xattn")
    names = {span.block.name for span in found[0].computed}
    assert names == {NAMES["lv-xattn"][0].format(rank) for rank in range(P)}
    block = Block(NAMES["lv-xattn"][0], 2, 1)
    assert str(block) == "the queries of rank 2 at hop 1"
    assert str(block._replace(source=3)) == "the queries of rank 2 at hop 1, from rank 3"
    assert str(block._replace(dest=0)) == "rank 0 to take the queries of rank 2 at hop 1"
    named = [kind.format(1) for kinds in NAMES.values() for kind in kinds]
    assert list(dict.fromkeys(named)) == [
        "the queries of rank 1",
        "the results for rank 1's queries",
        "the keys and values of rank 1",
        "the gradients of rank 1's keys and values",
    ]
    assert str(Block("all ranks' queries")) == "all ranks' queries"


def test_plain_meter_makes_no_names() -> None:
    def never(*_: Any) -> Block:
        raise AssertionError("put into words")

    meter = Meter()
    meter.sent(3, 1, never)
    with meter.computes(never), meter.waits(never):
        pass
    assert (meter.messages, meter.bytes) == (1, 3)


def hand_made() -> list[Timeline]:
    """Rank 0 sends two blocks to rank 1, which computes from 2 to 5 and from 6 to 7.

    On their way: 1 to 5.5 and 5 to 9.  Rank 0 computes from 0 to 4 and waits from 8 to 10.
    """
    one, two = Block("one", source=0), Block("two", source=0)
    work, done = Block("work"), Block("done", source=1)
    return [
        Timeline(
            computed=[Span(0, 4, work)],
            waited=[Span(8, 10, done)],
            posted=[Post(1, 1, 10, Block("one", dest=1)), Post(5, 1, 20, Block("two", dest=1))],
        ),
        Timeline(
            computed=[Span(2, 5, work), Span(6, 7, work)],
            waited=[Span(5.25, 5.5, one), Span(7.5, 9, two)],
        ),
    ]


def test_overlap_of_computing_and_messages() -> None:
    overlap = Trace.of(hand_made()).overlap()
    assert overlap == [Overlap(8, 3, 1), Overlap(8, 4, 1.75)]


def test_empty_blocks_have_no_arrow() -> None:
    one, two = hand_made()
    one.posted.append(Post(9.5, 1, 0, Block("nothing", dest=1)))
    two.waited.append(Span(9.25, 9.25, Block("nothing", source=0)))
    trace = Trace.of([one, two])
    arrows = [event for event in events(trace, ["here"] * 2) if event["ph"] in "stf"]
    assert Counter(event["name"] for event in arrows) == {"one": 2, "two": 2}


def test_drifting_clocks_are_aligned() -> None:
    zero, one = hand_made()
    # Rank 1's clock began at 100 and gains a hundredth of a second in a second.
    theirs = [100 + 1.01 * t for t in (-1, 11)]
    before, after = (Clock(t - true, 0.5, t) for t, true in zip(theirs, (-1, 11), strict=True))

    def skewed(spans: list[Span]) -> list[Span]:
        return [Span(100 + 1.01 * a, 100 + 1.01 * b, block) for a, b, block in spans]

    other = Timeline(computed=skewed(one.computed), waited=skewed(one.waited))
    trace = Trace.of([zero, other], [Clock(), before.until(after)])
    for got, want in zip(trace.overlap(), Trace.of([zero, one]).overlap(), strict=True):
        assert got == pytest.approx(want)
    assert trace.accuracy == [0, 0.5]


@pytest.mark.parametrize("slow", ["send", "receive"])
def test_clock_error_is_half_the_shortest_round_trip(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, offset = np.random.default_rng(0), -7.0

    class Slow:
        """Rank 0 of two; messages take their time, each another one, more in one direction."""

        rank, size, now = 0, 2, 0.0

        def passes(self, what: str) -> None:
            self.now += rng.uniform(1e-4, 1e-3) if what == slow else 1e-5

        def send(self, number: float, dest: int) -> None:
            self.passes("send")

        def receive(self, source: int) -> float:
            reading = self.now + offset
            self.passes("receive")
            return reading

        def allgather(self, sendobj: Any) -> list[Any]:
            return [sendobj, []]

    ranks: Any = Slow()
    monkeypatch.setattr(run_trace, "perf_counter", lambda: ranks.now)
    first, second = run_trace.compare_clocks(ranks)
    assert first[:2] == (0, 0)
    assert abs(second.offset - offset) <= second.accuracy
    assert 5e-5 <= second.accuracy < 1e-4  # the shortest, not any: the mean is 2.8e-4


def test_lanes_hold_disjoint_or_nested_spans() -> None:
    assert lanes([]) == []
    assert lanes([(0, 1), (1, 2), (1.5, 3), (1.6, 2), (2, 2.5), (3, 4)]) == [0, 0, 1, 0, 0, 0]


def lines(folder: Path, schedules: tuple[str, ...]) -> list[list[Any]]:
    """Command lines that write traces, one that does not, and those that must be refused."""
    traced = [
        [*SMALL, "--backward", "--schedule", name, "--repeat", "2", "--trace", folder / name,
         "--json", folder / f"{name}.json"]
        for name in schedules
    ]  # fmt: skip
    traced[0] += ["--plot-trace", folder / "picture.png"]
    return [*traced, [*SMALL, "--json", "-"], *[[*SMALL, *line] for line, _ in bad(folder)]]


def bad(folder: Path) -> list[tuple[list[Any], str]]:
    """What is refused, and what is said of it."""
    return [
        (["--trace", folder / "nowhere" / "x"], f"{folder / 'nowhere'}"),
        (["--plot-trace", folder / "nowhere" / "x.png"], f"{folder / 'nowhere'}"),
        (["--trace", folder], " cannot be written: expected a regular file, got a directory"),
        (["--trace", folder / "x", "--json", folder / "x"], "--json"),
        (["--trace", folder / "x.png", "--plot-trace", folder / "x.png"], "--plot-trace"),
        (["--schedule", "auto", "--machine", folder / "x", "--trace", folder / "x"],
         "--machine"),
        (["--plot-trace", folder / "x.jpeg"], "--plot-trace: expected a name that ends in .png"),
    ]  # fmt: skip


@pytest.mark.parametrize(("implementation", "schedules"), WORLDS)
def test_real_ranks_write_traces(
    implementation: str, schedules: tuple[str, ...], tmp_path: Path
) -> None:
    said = iter(commands(3, *lines(tmp_path, schedules), implementation=implementation))
    for name in schedules:
        one = next(said)
        assert (one.status, one.err) == (0, "")
        assert max(map(len, one.out.splitlines())) <= 100
        flows = check_trace(json.loads((tmp_path / name).read_text()), 3)
        report = json.loads((tmp_path / f"{name}.json").read_text())
        check_overlap(report, one)
        assert "medians; below is the last of 2 repetitions alone" in one.out
        files = one.out.partition("\n\n  written   ")[2].split()
        assert {f"{name}.json", name} <= {Path(file).name for file in files}
        assert all(Path(file).stat().st_size for file in files)
        arrows = sum(len(flow) // 2 for flow in flows.values())
        assert arrows == report["totals"]["messages"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    untraced = json.loads(next(said).out)
    assert "hidden" not in untraced["totals"]
    for (line, text), refusal in zip(bad(tmp_path), said, strict=True):
        assert (refusal.status, refusal.out, refusal.err.count("\n")) == (2, "", 1), line
        assert text in refusal.err
    assert not (tmp_path / "x").exists()


def check_overlap(report: dict[str, Any], said: Said) -> None:
    for rank in report["ranks"]:
        assert 0 < rank["hidden"] + rank["exposed"] <= rank["on_the_way"] * (1 + 1e-9)
    for name in Overlap._fields:
        total = sum(rank[name] for rank in report["ranks"])
        assert report["totals"][name] == pytest.approx(total)
    assert "hidden behind computing" in said.out


def test_picture_without_matplotlib_is_refused_before_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda _: None)
    assert main([*SMALL, "--plot-trace", str(tmp_path / "x.png")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "--plot-trace: needs matplotlib, which is not installed" in said.err


def test_recorder_without_trace_is_a_plain_meter() -> None:
    no_ranks: Any = None  # comparing clocks with other ranks would fail
    recorder = run_trace.Recorder(Namespace(trace=None, plot_trace=None), no_ranks)
    assert type(recorder.meter(last=True)) is Meter
    assert recorder.trace() is None
