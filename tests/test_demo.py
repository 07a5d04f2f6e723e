"""The demo finds its patches on any number of ranks, and rejects bad input with one line."""

import importlib
import os
import re
import struct
import subprocess
import sys
from argparse import Namespace
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from PIL import Image

from lvxattn.mpi_impl.__main__ import main
from lvxattn.mpi_impl.commands.demo.answers import (
    AMBIGUOUS,
    FOUND,
    WRONG,
    Check,
    check_errors,
    check_output,
    check_verdicts,
    judge_answers,
)
from lvxattn.mpi_impl.commands.demo.files import index_video, read_images, read_video
from lvxattn.mpi_impl.commands.demo.sources import open_source, pan_over_photographs
from tests.commands import Said, commands

av = pytest.importorskip("av")
MPIEXEC = os.environ.get("LVXATTN_MPIEXEC") or str(Path(sys.executable).with_name("mpiexec"))

Finished = subprocess.CompletedProcess[str]


def demo(ranks: int, folder: Path, *arguments: str) -> Finished:
    command = [*MPIEXEC.split(), "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m"]
    output = () if "--output" in arguments else ("--output", str(folder / "demo.png"))
    return subprocess.run(
        [*command, "lvxattn.mpi_impl", "demo", *arguments, *output],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env={**os.environ, "LVXATTN_PROGRESS": "plain"},
    )


def assert_found(printed: str, picture_at: Path, queries: int) -> None:
    counts = re.search(r"found (\d+) of (\d+)", printed)
    assert counts is not None
    assert int(counts[2]) == queries
    assert int(counts[1]) >= 0.9 * queries
    assert "all checks passed" in printed
    assert max(map(len, printed.splitlines())) <= 100
    with Image.open(picture_at) as picture:
        assert picture.width >= 1200


def default_frames(count: int) -> np.ndarray:
    return pan_over_photographs(0, count, 240, 320, lambda _: None, frames=count, seed=1)


def write_video(path: Path, frames: int = 20, codec: str = "mpeg4", **options: str) -> Path:
    """Encode a clip of the default video, a keyframe every 8 frames and B-frames between."""
    video = default_frames(frames)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 8, 2
        for pixels in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for number, (pixels, size) in enumerate(zip(default_frames(len(sizes)), sizes, strict=True)):
        Image.fromarray(pixels).resize(size).save(folder / f"{number:03}.png")
    return folder


@pytest.mark.mpi
def test_default_video_on_three_ranks(tmp_path: Path) -> None:
    finished = demo(3, tmp_path, "--frames", "16", "--queries", "40")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_found(finished.stdout, tmp_path / "demo.png", 40)
    assert "4,800 visual tokens" in finished.stdout


def test_default_video_on_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["demo", "--frames", "16", "--queries", "40", "--output", str(tmp_path / "demo.png")]
    assert main(line, MPI.COMM_SELF) == 0
    printed = capsys.readouterr().out
    assert_found(printed, tmp_path / "demo.png", 40)
    assert "4,800 visual tokens" in printed


def test_full_disk_is_named_after_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, _: bytes) -> None:
        raise OSError(ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("lvxattn.draw.picture.write_file", fail)
    output = tmp_path / "demo.png"
    line = ["demo", "--frames", "16", "--queries", "40", "--output", str(output)]
    assert main(line, MPI.COMM_SELF) == 2
    said = capsys.readouterr()
    assert "found" in said.out
    assert re.fullmatch(
        rf"lvxattn demo: error: --output: {output} cannot be written: No space left on device.*\n",
        said.err,
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Said, Path]]:
    """The output of three ranks, in one launch, for images of different sizes and for a video."""
    folder = tmp_path_factory.mktemp("searched")
    images = write_images(folder / "images", [(320, 240), (500, 300)])
    clip = write_video(folder / "clip.mp4")
    lines = {
        "images": ["--images", images, "--queries", "10"],
        "video": ["--video", clip, "--queries", "20", "--frames", "13"],
    }
    said = commands(
        3, *[["demo", *line, "--output", folder / f"{name}.png"] for name, line in lines.items()]
    )
    return {name: (x, folder / f"{name}.png") for name, x in zip(lines, said, strict=True)}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("source", "queries", "title"),
    [("images", 10, "the images in images"), ("video", 20, "clip.mp4, 13 of its 20 frames")],
)
def test_files_are_searched(
    source: str, queries: int, title: str, searched: dict[str, tuple[Said, Path]]
) -> None:
    said, picture = searched[source]
    assert said.status == 0, said
    assert_found(said.out, picture, queries)
    assert title in said.out


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])  # a .ts is seldom sought exactly
def test_any_range_of_a_video_gives_same_frames(container: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"clip.{container}")
    index = index_video(path)
    assert index.frames == len(index.pts) == 20
    assert len(index.starts) > 2
    whole = read(path)
    for picks in ([], [0], [19], [7, 8, 9], [1, 6, 12, 18], list(range(10, 20))):
        np.testing.assert_array_equal(read(path, picks), whole[picks])


def read(path: Path, picks: list[int] | None = None) -> np.ndarray:
    """Return frames of a video, all unless picked, as they are shown."""
    index = index_video(path)
    picks = list(range(index.frames)) if picks is None else picks
    return read_video(path, picks, index, index.height, index.width, lambda _: None)


@pytest.mark.parametrize("name", ["clip.h264", "joined.ts", "joined.m2ts"])
def test_frames_without_timestamps_are_counted(name: str, tmp_path: Path) -> None:
    once = write_video(tmp_path / f"once{Path(name).suffix}", codec="libx264")
    path, whole = tmp_path / name, read(once)
    path.write_bytes(once.read_bytes() * 2)
    assert index_video(path).pts == []
    joined = read(path)
    np.testing.assert_array_equal(joined, np.concatenate([whole, whole]))
    for picks in ([39], [3, 4, 25], list(range(20, 40))):
        np.testing.assert_array_equal(read(path, picks), joined[picks])


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "shown"),
    [
        (1, 0, 0, 1, lambda x: x),
        (0, 1, -1, 0, lambda x: np.rot90(x, -1)),  # a phone's upright video
        (-1, 0, 0, -1, lambda x: np.rot90(x, 2)),
        (0, -1, 1, 0, np.rot90),
        (-1, 0, 0, 1, np.fliplr),  # as in a mirror
        (0, 1, 1, 0, lambda x: x.transpose(1, 0, 2)),
    ],
    ids=["none", "90", "180", "270", "mirrored", "transposed"],
)
def test_display_matrix_is_applied(
    a: int, b: int, c: int, d: int, shown: Any, tmp_path: Path
) -> None:
    flat = write_video(tmp_path / "flat.mp4", frames=3)
    data = bytearray(flat.read_bytes())
    one = 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    at = data.find(identity, data.find(b"tkhd"))
    matrix = one * a, one * b, 0, one * c, one * d, 0, 0, 0, 1 << 30
    data[at : at + 36] = struct.pack(">9i", *matrix)
    (tmp_path / "turned.mp4").write_bytes(data)
    turned = read(tmp_path / "turned.mp4")
    np.testing.assert_array_equal(turned, np.stack([shown(x) for x in read(flat)]))
    source = open_source(Namespace(video=str(tmp_path / "turned.mp4"), images=None, frames=None))
    assert (source.rows > source.cols) == (a == 0)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled(suffix: str, tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).repeat(256).reshape(256, 256) * 257
    Image.fromarray(grey).save(tmp_path / f"grey{suffix}")
    (picture,) = read_images([tmp_path / f"grey{suffix}"], 256, 256, lambda _: None)
    np.testing.assert_array_equal(picture, (grey // 257)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("white", [1, 255])
def test_float_grey_is_scaled(white: int, tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.float32).repeat(256).reshape(256, 256)
    Image.fromarray(grey * np.float32(white / 255)).save(tmp_path / "grey.tiff")
    (picture,) = read_images([tmp_path / "grey.tiff"], 256, 256, lambda _: None)
    np.testing.assert_allclose(picture, grey[..., None].repeat(3, axis=2), atol=1)


def test_file_name_with_colon(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=3).rename(tmp_path / "12:30.mp4")
    assert index_video(path).frames == 3


def nothing(folder: Path) -> list[str]:
    return ["--video", str(folder / "none.mp4")]


def garbage(folder: Path) -> list[str]:
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    return ["--video", str(folder / "noise.mp4")]


def truncated(folder: Path, name: str = "half.mp4", **options: str) -> list[str]:
    path = write_video(folder / name, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return ["--video", str(path)]


def truncated_behind_its_index(folder: Path) -> list[str]:
    return truncated(folder, movflags="+faststart")


def truncated_matroska(folder: Path) -> list[str]:
    return truncated(folder, "half.mkv")


def overwritten(folder: Path) -> list[str]:
    data = bytearray(write_video(folder / "whole.mp4", codec="libx264").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    (folder / "hurt.mp4").write_bytes(data)
    return ["--video", str(folder / "hurt.mp4")]


def no_pictures(folder: Path) -> list[str]:
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    return ["--video", str(folder / "sound.wav")]


def unknown_codec(folder: Path) -> list[str]:
    data = write_video(folder / "whole.mp4", frames=3, codec="libx264").read_bytes()
    (folder / "strange.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    return ["--video", str(folder / "strange.mp4")]


def zero_frames(_: Path) -> list[str]:
    return ["--frames", "0"]


def negative_queries(_: Path) -> list[str]:
    return ["--queries", "-3"]


def no_output_folder(_: Path) -> list[str]:
    return ["--output", "none/a.png"]


def empty(folder: Path) -> list[str]:
    (folder / "empty.mp4").touch()
    return ["--video", str(folder / "empty.mp4")]


def fifo_video(folder: Path) -> list[str]:
    os.mkfifo(folder / "fifo.mp4")
    return ["--video", str(folder / "fifo.mp4")]


def fifo_image(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    os.mkfifo(folder / "images" / "fifo.png")
    return ["--images", str(folder / "images")]


def fifo_folder(folder: Path) -> list[str]:
    os.mkfifo(folder / "fifo")
    return ["--images", str(folder / "fifo")]


def no_folder(folder: Path) -> list[str]:
    return ["--images", str(folder / "none")]


def no_images(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    (folder / "images" / "notes.txt").touch()
    return ["--images", str(folder / "images")]


def damaged_image(folder: Path) -> list[str]:
    images = write_images(folder / "images", [(320, 240)] * 4)
    (images / "003.png").write_bytes((images / "003.png").read_bytes()[:5000])
    return ["--images", str(images)]


def huge_image(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    Image.new("1", (10000, 10000)).save(folder / "images" / "huge.png")
    return ["--images", str(folder / "images")]


def output_that_is_searched(folder: Path) -> list[str]:
    images = write_images(folder / "images", [(320, 240)] * 4)
    (folder / "demo.png").symlink_to(images / "003.png")
    return ["--images", str(images)]


def flat_images(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    Image.new("RGB", (320, 240), "grey").save(folder / "images" / "grey.png")
    return ["--images", str(folder / "images")]


BAD = {
    nothing: r"--video: .*none.mp4 cannot be read: No such file or directory \(on rank 0 of 2\)",
    garbage: r"--video: expected an undamaged video; .*noise.mp4 gives: .* \(on rank 0 of 2\)",
    truncated: r"--video: .*half.mp4.* \(on rank 0 of 2\)",
    truncated_behind_its_index: r"half.mp4 gives: \d+ of the 20 frames it announces",
    truncated_matroska: r"half.mkv gives: an end after 0.\d of the 0.8 s it announces",
    overwritten: r"--video: .*hurt.mp4 gives: a broken frame \d+ of 20",
    unknown_codec: r"--video: expected .* that PyAV decodes; it does not know .*strange.mp4's",
    no_pictures: r"--video: expected a video; .*sound.wav holds no stream of frames",
    empty: r"--video: .*empty.mp4.* \(on rank 0 of 2\)",
    fifo_video: r"--video: .*fifo.mp4 cannot be read: expected a regular file, got a FIFO",
    fifo_image: r"--images: .*fifo.png.*expected a regular file, got a FIFO",
    fifo_folder: r"--images: expected a folder; there is a file at .*fifo",
    no_folder: r"--images: expected a folder; there is nothing at .*none \(on rank 0 of 2\)",
    no_images: r"--images: expected a folder with images \(.*\); .*images \(on rank 0 of 2\)",
    damaged_image: r"--images: expected images .*003.png gives: .* \(on rank 1 of 2\)",
    huge_image: r"--images: expected pictures of at most 89,478,485 pixels; those of .*huge.png",
    output_that_is_searched: r"--output: expected another file than those searched, got .*demo.png",
    flat_images: r"expected patches with some texture .* 1 frame.* flat \(on all ranks\)",
    zero_frames: r"argument --frames: .*'0' \(on all ranks\)",
    negative_queries: r"--queries: .*'-3' \(on all ranks\)",
    no_output_folder: r"--output: .* there is no folder .*none \(on rank 0 of 2\)",
}


def test_unwritable_picture_raises() -> None:
    with pytest.raises(
        ValueError, match=r"^--output: x+\.png cannot be written: File name too long"
    ):
        check_output(Path("x" * 300 + ".png"))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Said, Path]]:
    """The output of two ranks for each bad input, all in one launch, and the picture's path."""
    pictures, lines = [], []
    for make in BAD:
        folder = tmp_path_factory.mktemp(make.__name__)
        pictures.append(folder / "demo.png")
        lines.append(["demo", "--output", pictures[-1], *make(folder)])
    return dict(zip(BAD, zip(commands(2, *lines), pictures, strict=True), strict=True))


@pytest.mark.mpi
@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_input_prints_one_line_and_exits_2(make, told) -> None:
    said, picture = told[make]
    assert said.status == 2, said
    assert re.fullmatch(f"lvxattn demo: error: .*{BAD[make]}.*\n", said.err)
    if make is output_that_is_searched:
        with Image.open(picture) as image:
            assert image.size == (320, 240)
    else:
        assert not picture.exists()


@pytest.mark.mpi
def test_broken_frame_prints_one_line(tmp_path: Path) -> None:
    finished = demo(2, tmp_path, *overwritten(tmp_path))  # FFmpeg would print, too
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert re.fullmatch(f"lvxattn demo: error: .*{BAD[overwritten]}.*\n", finished.stderr)
    assert not (tmp_path / "demo.png").exists()


def test_wrong_attention_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = importlib.import_module("lvxattn.mpi_impl.commands.demo.search")
    right = search.cross_attention

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out + np.float32(1), lse

    arguments = ["demo", "--frames", "3", "--queries", "8", "--output", str(tmp_path / "a.png")]
    assert main(arguments, MPI.COMM_SELF) == 0
    monkeypatch.setattr(search, "cross_attention", wrong)
    assert main(arguments, MPI.COMM_SELF) == 1
    printed = capsys.readouterr().out
    assert "8 WRONG" in printed
    assert "a check FAILED" in printed


def test_answer_is_wrong_only_if_its_weight_is_clear() -> None:
    truth = np.array([[5, 2, 3]] * 5)
    out = np.array([[5.1, 2, 3], [6, 2, 3], [6, 2, 3], [5, 2, 3], [np.nan, 2, 3]])
    weight = np.array([0.99, 0.8, 0.999, 1.2, 0.5])
    verdicts = judge_answers(out, truth, weight, np.array([20, 8, 8]), 1e-3)
    assert verdicts == [FOUND, AMBIGUOUS, WRONG, WRONG, WRONG]


def test_checks_fail_on_wrong_missed_and_nan_answers() -> None:
    def passed(verdicts: list[str], distinct: bool) -> bool:
        return all(check.passed for check in check_verdicts(verdicts, distinct=distinct))

    assert passed([FOUND] * 90 + [AMBIGUOUS] * 10, True)
    assert not passed([FOUND] * 89 + [AMBIGUOUS] * 11, True)
    assert passed([AMBIGUOUS] * 100, False)
    assert not passed([FOUND] * 99 + [WRONG], False)
    assert not Check("x", np.nan, 1.0, "").passed
    out, lse = np.ones((2, 3)), np.ones(2)
    near, far = check_errors(out, lse + 1e-3, out + 1.0, lse, 100.0, 2e-3)
    assert near.passed
    assert not far.passed
