"""Pictures: that they show what was sent, in the right place and colour."""

from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.common.handshake import SCHEDULES
from lvxattn.reference import Layout, Message

pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.patches import Ellipse, Rectangle
from matplotlib.text import Annotation

from lvxattn.common.meter import Block
from lvxattn.common.timeline import Post, Span, Timeline
from lvxattn.common.wire import PARTIALS, QUERIES
from lvxattn.draw.bars import byte_bars, format_bytes
from lvxattn.draw.film import animation, film_strip, scenes, step
from lvxattn.draw.grid import grid
from lvxattn.draw.picture import save_picture
from lvxattn.draw.rotation import COLOURS, sheet
from lvxattn.draw.trace import draw_trace
from lvxattn.plan.trace import Trace
from tests.full_disk import full_disk

RINGS = ["lv-xattn", "ring"]


def forward(
    schedule: str, P: int, hosts: Sequence[str] | None = None
) -> tuple[list[Message], list[Layout]]:
    """Return a forward's messages, and every rank's layout."""
    rng, log = np.random.default_rng(0), []
    q, kv = rng.standard_normal((1, 1, 2 * P, 4)), rng.standard_normal((1, 1, 3 * P, 4))

    def on_a_rank(comm: reference.VirtualComm) -> Layout:
        q_part, kv_part = reference.shard(q, comm), reference.shard(kv, comm)
        layout = Layout.agree(q_part, kv_part, kv_part, comm, schedule=schedule)
        reference.cross_attention(q_part, kv_part, kv_part, comm, layout=layout)
        return layout

    return log, reference.run_ranks(P, on_a_rank, log=log, hosts=hosts)


@pytest.mark.parametrize("P", [2, 3, 4, 5])
@pytest.mark.parametrize("schedule", RINGS)
class TestScenes:
    def test_film_follows_the_ring(self, schedule: str, P: int) -> None:
        log, layouts = forward(schedule, P, hosts=[f"host {rank % 2}" for rank in range(P)])
        found = scenes(schedule, log)
        assert len(found) == P + (schedule == "lv-xattn")  # and home again
        for hop, column in enumerate(found):
            assert [scene.owner for scene in column] == [of.owner(hop) for of in layouts]

    def test_every_result_covers_all_keys_once(self, schedule: str, P: int) -> None:
        found = scenes(schedule, forward(schedule, P)[0])
        for scene in found[-1]:
            assert sorted(scene.joined) == list(range(P))
        for hop, column in enumerate(found[:P]):
            for rank, scene in enumerate(column):
                # What is worked on now is what has been joined last.
                assert scene.joined[-1] == (rank if schedule == "lv-xattn" else scene.owner)
                travels = schedule == "lv-xattn" and hop > 0
                assert len(scene.joined) == hop + (not travels)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4, 2)], ids=str)
def test_grid_shows_what_each_rank_sends(shape: tuple[int, int]) -> None:
    a, b = shape
    (axes,) = grid(a, b).axes
    said = Counter(text.get_text() for text in axes.texts if " x" in text.get_text())
    queries, keys = (a - 1) * b, (b - 1) * a  # those that do not wrap around
    assert said == {f"q x{a - 1}": queries, f"results x{a - 1}": queries, f"k, v x{b - 1}": keys}
    assert len([x for x in axes.texts if isinstance(x, Annotation)]) == (2 + 1) * a * b
    with pytest.raises(ValueError, match="a, b: expected 2 to 4, got 1 and 3"):
        grid(1, 3)


@pytest.mark.parametrize("schedule", RINGS)
def test_film_of_other_than_one_forward_raises(schedule: str) -> None:
    log = forward(schedule, 3)[0]
    for wrong in ([], log[:-1], log + log, forward("gather", 3)[0]):
        with pytest.raises(ValueError, match="log: expected P - 1 messages of each kind from"):
            scenes(schedule, wrong)
    with pytest.raises(ValueError, match="schedule: expected one of lv-xattn, ring, got 'gather'"):
        scenes("gather", log)
    with pytest.raises(ValueError, match="logs: expected forwards of 2 to 8 ranks, got 9"):
        film_strip({schedule: forward(schedule, 9)[0]})


class TestFilmStrip:
    def test_columns_are_hops_and_rows_are_ranks(self) -> None:
        logs = {schedule: forward(schedule, 3)[0] for schedule in RINGS}
        figure = film_strip(logs)
        for axes, schedule in zip(figure.axes, RINGS, strict=True):
            stays, travels = blocks(axes, Rectangle), blocks(axes, Ellipse)
            if schedule == "ring":
                stays, travels = travels, stays
            assert stays == {(-1, rank): rank for rank in range(3)}
            assert travels == {
                (column, rank): scene.owner
                for column, by_rank in enumerate(scenes(schedule, logs[schedule]))
                for rank, scene in enumerate(by_rank)
            }

    def test_blocks_show_covered_keys(self) -> None:
        log = forward("lv-xattn", 3)[0]
        (axes,) = film_strip({"lv-xattn": log}).axes
        squares: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for x, y, _, rank in patches(axes, Rectangle, most=0.2):
            squares.setdefault((round(x), round(y - 0.3)), []).append((x, rank))
        assert {at: tuple(rank for _, rank in sorted(s)) for at, s in squares.items()} == {
            (column, rank): scene.joined
            for column, by_rank in enumerate(scenes("lv-xattn", log))
            for rank, scene in enumerate(by_rank)
        }


def patches(axes: Any, kind: type, most: float = 1.0) -> list[tuple[float, float, float, int]]:
    """Return middle, width and rank of what is drawn, the rows' backgrounds left out."""
    found = []
    for patch in axes.patches:
        colour = to_hex(patch.get_facecolor()).upper()
        if type(patch) is kind and patch.get_width() <= most and patch.get_alpha() is None:
            x, y = patch.get_center()
            found.append((x, y, patch.get_width(), COLOURS.index(colour)))
    return found


def blocks(axes: Any, kind: type) -> dict[tuple[int, int], int]:
    return {(round(x), round(y)): n for x, y, width, n in patches(axes, kind) if width > 0.5}


@pytest.mark.parametrize("hops", [1, 4])
@pytest.mark.parametrize("schedule", RINGS)
def test_animation_counts_its_steps(schedule: str, hops: int) -> None:
    found = [
        step(schedule, hops, hop, results=results)
        for hop in range(1, hops + 1)
        for results in (False, True)
    ]
    numbers = [text.partition(":")[0] for text in found]
    assert numbers == [f"step {n} of {2 * hops}" for n in range(1, 2 * hops + 1)]
    assert step(schedule, hops, 0, results=False) == f"step 0 of {2 * hops}: at home"


@pytest.mark.parametrize("engine", [False, True], ids=["plain", "constrained"])
def test_animation_is_a_small_png(engine: bool) -> None:
    image = pytest.importorskip("PIL.Image")
    with rc_context({"figure.constrained_layout.use": engine}):  # the notebooks' style
        data = animation({schedule: forward(schedule, 3)[0] for schedule in RINGS})
    assert len(data) < 300_000
    film = image.open(BytesIO(data))
    assert film.format == "PNG"
    assert film.info["loop"] == 0  # for ever
    pictures, times = [], []
    for n in range(film.n_frames):
        film.seek(n)
        pictures.append(np.asarray(film.convert("RGB")))
        times.append(film.info["duration"])
    assert all((a != b).any() for a, b in pairwise(pictures))
    assert times[-1] == max(times)
    # Blocks are as many in every picture.  In both halves three results have two squares more each
    # at the end, of 25 pixels at least.
    rgb = [tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5)) for colour in COLOURS[:3]]
    for first, last in zip(
        *(np.array_split(p, 2, axis=1) for p in (pictures[0], pictures[-1])), strict=True
    ):
        assert sum(near(last, c) for c in rgb) > sum(near(first, c) for c in rgb) + 150


def near(picture: Any, colour: tuple[int, ...]) -> int:
    return int((np.abs(picture.astype(int) - colour).max(axis=-1) < 12).sum())


class TestByteBars:
    def test_bar_length_and_label(self) -> None:
        sizes = {"lv-xattn": 12_345.0, "ring": 3e9, "gather": 0.0}
        (axes,) = byte_bars({"a model": sizes}).axes
        ends = {bar.get_x() + bar.get_width() for bar in axes.patches if bar.get_width() > 0}
        assert sorted(ends) == pytest.approx([12_345, 3e9])
        said = {text.get_text().strip() for text in axes.texts}
        assert said == {"a model", "12.3 kB", "3 GB", "0 B"}
        assert [label.get_text() for label in axes.get_yticklabels()] == list(sizes)
        assert axes.get_xscale() == "log"

    def test_schedule_colours_are_unique(self) -> None:
        (axes,) = byte_bars({"": {"kept": 5.0, "ring": 9.0}, "more": {"lv-xattn": 7.0}}).axes
        colours = [COLOURS.index(to_hex(bar.get_facecolor()).upper()) for bar in axes.patches]
        assert colours[1:] == [SCHEDULES.index("ring"), SCHEDULES.index("lv-xattn")]
        assert colours[0] >= len(SCHEDULES)

    @pytest.mark.parametrize("groups", [{}, {"a": {}}, {"a": {"ring": -1.0}}])
    def test_bad_bars_raise(self, groups: Any) -> None:
        with pytest.raises(ValueError, match="groups: expected bars of 0 bytes or more, got"):
            byte_bars(groups)

    @pytest.mark.parametrize(
        ("size", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1 kB"),
            (251_828_961_280, "252 GB"),
            (1e15, "1e+03 TB"),
        ],
    )
    def test_sizes_have_three_digits(self, size: float, text: str) -> None:
        assert format_bytes(size) == text


def test_trace_shows_spans_and_arrows() -> None:
    queries, results = (Block(kind.name, owner=0, hop=1) for kind in (QUERIES, PARTIALS))
    sender = Timeline(
        computed=[Span(0, 3e-3, queries)],
        posted=[Post(0, 1, 800, queries), Post(1e-3, 1, 0, results)],  # an empty one: no arrow
    )
    receiver = Timeline(
        computed=[Span(1e-3, 2e-3, Block("some other work"))],
        waited=[
            Span(2e-3, 3.5e-3, queries._replace(source=0)),
            Span(3.5e-3, 4e-3, results._replace(source=0)),
        ],
    )
    axes = draw_trace(Trace.of([sender, receiver]), "LV-XAttn").axes[0]
    found = set()
    for bars in axes.collections:
        for path in bars.get_paths():
            (left, top), (right, bottom) = path.get_extents().get_points()
            colour = COLOURS.index(to_hex(bars.get_facecolor()[0]).upper())
            assert int(top) == int(bottom)
            found.add((colour, int(top), round(left, 9), round(right, 9)))
    computing, waiting, sending = 0, 1, 2
    assert found == {
        (computing, 0, 0.0, 3.0), (computing, 1, 1.0, 2.0), (waiting, 1, 2.0, 3.5),
        (waiting, 1, 3.5, 4.0), (sending, 0, 0.0, 3.5), (sending, 0, 1.0, 4.0),
    }  # fmt: skip
    (arrow,) = (text for text in axes.texts if isinstance(text, Annotation))
    (start, from_rank), (end, to_rank) = arrow.xyann, arrow.xy
    assert (start, int(from_rank), end, int(to_rank)) == (0, 0, 3.5, 1)
    said = [text.get_text() for text in axes.texts if text is not arrow]
    assert said == ["0"]  # the owner of the block; other work has none


@pytest.mark.parametrize(
    ("name", "begins"),
    [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml"), ("a", b"\x89PNG")],
)
def test_picture_has_the_format_of_its_name(name: str, begins: bytes, tmp_path: Path) -> None:
    save_picture(sheet()[0], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_picture_on_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    figure, path = sheet()[0], tmp_path / "a.png"
    save_picture(figure, path)
    before = path.read_bytes()
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        save_picture(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sheet_is_800_pixels_wide() -> None:
    figure, axes = sheet(2.5)
    assert tuple(figure.bbox.size) == (800, 250)
    assert figure.axes == [axes]
    figure, panels = sheet(columns=3)
    assert figure.axes == panels
    assert len(panels) == 3
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        sheet(columns=0)
