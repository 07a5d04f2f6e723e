"""Damaged files are read, or refused in one line by an error that the reader documents.

Inputs are seeded: input n of a reader is the same on every machine.  Each is a valid file of which
bits, bytes, or nodes of its JSON have been changed.
"""

import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvxattn import pytest_plugin
from lvxattn.check import golden, golden_names
from lvxattn.check.golden_data import SHIPPED, verify_golden, write_tensors
from lvxattn.check.golden_manifest import MANIFEST, format_manifest
from lvxattn.cli.run_problem import describe, take_share
from lvxattn.cli.tensors import InputError, open_tensors
from lvxattn.common.launcher import mismatch, speaks
from lvxattn.mpi_impl.commands.demo.files import (
    index_video,
    read_images,
    read_video,
    size_of_image,
)
from lvxattn.plan.machine import MACHINES, Machine, Measured, machine_of

MANY = 4000
# What files may hold in place of something else.
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**30, 10**400, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "a\nb", "\x1b[31m", "\ud800", "²", "..", "../x", "/"),
    *([], {}, [1], [[]], {"a": 1}, [0, 2**40, 2**40], [2**62] * 3, [1] * 70, "F64", "I64", "BOOL"),
    {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
]


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes
    ----------
    make : callable
        Writes valid files into a folder, and returns them.
    read : callable
        Reads one.
    errors : tuple of type
        Those that it documents.
    count : int
        Inputs of the quick test.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    count: int = 300


def make_tensors(folder: Path) -> list[Path]:
    """Return files of ``run --input``, with masks of both kinds and without."""
    q, k = np.ones((1, 2, 3, 4), np.float32), np.ones((1, 1, 5, 4), np.float32)
    arrays = {"q": q, "k": k, "v": k, "dout": q}
    masks = [{}, {"mask": np.ones((1, 1, 1, 5), bool)}, {"mask": np.zeros((3, 5), np.float32)}]
    paths = [folder / f"{n}.safetensors" for n in range(len(masks))]
    for path, mask in zip(paths, masks, strict=True):
        write_tensors(path, {**arrays, **mask}, {"note": "text"})
    return paths


def read_tensors(path: Path) -> None:
    """Read all tensors of a file."""
    file = open_tensors(str(path))
    for name, tensor in file.tensors.items():
        file.read(name, 0, slice(0, *tensor.shape[:1]))


def read_problem(path: Path) -> None:
    """Read one rank's share of the problem in a file."""
    take_share(describe(Namespace(input=str(path), backward=True, scale=None)), 1, 2)


def make_golden(folder: Path) -> list[Path]:
    """Return a folder's manifest of one case, and its file."""
    manifest = json.loads((SHIPPED / MANIFEST).read_text())
    entry = manifest["cases"]["value-size"]
    cases = {"cases": {"value-size": entry}}
    (folder / MANIFEST).write_text(format_manifest({**manifest, **cases}))
    return [folder / MANIFEST, Path(shutil.copy(SHIPPED / entry["file"], folder))]


def read_golden(path: Path) -> None:
    """Read and verify golden files, one of which is damaged."""
    folder = path.parent / "golden"
    folder.mkdir(exist_ok=True)
    manifest, file = make_golden(folder)
    shutil.copy(path, folder)
    if path.name == file.name:  # with the right checksum: damage that was written so
        document = json.loads(manifest.read_text())
        document["cases"]["value-size"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(document))
    for name in golden_names(folder):
        golden(name, folder)
    for line in verify_golden(folder):
        assert line.isprintable(), line


def make_machines(folder: Path) -> list[Path]:
    """Return machine files."""
    MACHINES["h100"].save(folder / "preset")
    figures = MACHINES["a30-8"].__dict__
    measured = Measured("mpi_impl", "CPU", 8, 4, 64, "float32")
    Machine(**{**figures, "measured": measured}).save(folder / "measured")
    return [folder / "preset", folder / "measured"]


def make_images(folder: Path) -> list[Path]:
    """Return small images in all formats."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    names = [f"image{end}" for end in (".png", ".jpg", ".bmp", ".gif", ".webp", ".tif", ".ppm")]
    for name in names:
        image.save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    Image.fromarray(rng.integers(0, 65536, (24, 32), np.uint16)).save(folder / "grey.png")
    Image.fromarray(rng.random((24, 32), np.float32)).save(folder / "float.tif")
    return [folder / name for name in (*names, "turned.jpg", "grey.png", "float.tif")]


def read_image(path: Path) -> None:
    """Read an image as the demo does."""
    size_of_image(path)
    read_images([path], 16, 16, lambda _: None)


def make_videos(folder: Path) -> list[Path]:
    """Return short videos in several containers, with times and without."""
    av = pytest.importorskip("av")
    paths = [folder / name for name in ("clip.mp4", "clip.mkv", "clip.avi", "clip.m4v")]
    for path in paths:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            for n in range(6):
                pixels = np.full((24, 32, 3), 40 * n, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    return paths


def read_frames(path: Path) -> None:
    """Read some frames of a video as the demo does."""
    index = index_video(path)
    picks = sorted({0, index.frames // 2, index.frames - 1})
    read_video(path, picks, index, 16, 16, lambda _: None)


def make_xfails(folder: Path) -> list[Path]:
    """Return a list of known failures."""
    path = folder / "xfails.txt"
    path.write_text("# known\ntest_a[one-key-float32]\n*-bfloat16  # é\n")
    return [path]


def read_xfails(path: Path) -> None:
    """Read a list of known failures, and compare its lines with a name."""
    for _, line in pytest_plugin._lines(str(path)):
        pytest_plugin._fits(line, "test_a[one-key-float32]")


def make_environment(folder: Path) -> list[Path]:
    """Return the variables of launchers, one a line."""
    path = folder / "environment"
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "PMI_RANK", "PMIX_RANK")
    path.write_text("".join(f"{name}=1²\n{name}=2\n" for name in names), "utf-8")
    return [path]


def read_environment(path: Path) -> None:
    """Read the variables of a launcher, of which damage leaves some."""
    lines = path.read_bytes().decode(errors="surrogateescape").splitlines()
    variables = dict(line.split("=", 1) for line in lines if "=" in line)
    mismatch(variables, 1)
    speaks(variables, 0)


READERS = {
    "tensors": Reader(make_tensors, read_tensors, (InputError,), 1000),
    "problem": Reader(make_tensors, read_problem, (InputError,), 1000),
    "golden": Reader(make_golden, read_golden, (InputError,), 60),
    "machine": Reader(make_machines, Machine.load, (ValueError,), 2000),
    "machine option": Reader(make_machines, lambda p: machine_of(str(p)), (ValueError,), 2000),
    "images": Reader(make_images, read_image, (ValueError,)),
    "videos": Reader(make_videos, read_frames, (ValueError,)),
    "xfails": Reader(make_xfails, read_xfails, (pytest.UsageError,), 2000),
    "environment": Reader(make_environment, read_environment, (), 2000),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_file_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], READERS[name].count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], MANY, tmp_path)


def fuzz(reader: Reader, count: int, folder: Path) -> None:
    """Let a reader read damaged files."""
    (folder / "valid").mkdir()
    (folder / "damaged").mkdir()
    valid = reader.make(folder / "valid")
    refused = 0
    for n in range(-len(valid), count):
        rng = Random(n)
        file = valid[n % len(valid)]
        path = folder / "damaged" / file.name
        content = file.read_bytes()
        path.write_bytes(content if n < 0 else damage(content, rng))
        try:
            reader.read(path)
        except reader.errors as error:
            assert n >= 0, "a valid file is refused"
            text = str(error)
            assert 0 < len(text) < 1000, f"input {n} of {file.name}: {text}"
            assert text.isprintable(), f"input {n} of {file.name}: {text!r}"
            refused += 1
        except Exception as error:
            raise AssertionError(f"input {n} of {file.name}") from error
    assert refused or not reader.errors
    assert refused < count


def damage(content: bytes, rng: Random) -> bytes:
    """Change a file in one to three places."""
    for _ in range(rng.randint(1, 3)):
        start = 8 + int.from_bytes(content[:8], "little")  # of a safetensors file's data
        header = content[8:start] if start < len(content) else b""
        if header[:1] == b"{" and rng.random() < 0.7:
            header = damage_json(header, rng)
            content = len(header).to_bytes(8, "little") + header + content[start:]
        elif content[:1] == b"{" and rng.random() < 0.7:
            content = damage_json(content, rng)
        else:
            content = damage_bytes(content, rng)
    return content


def damage_json(content: bytes, rng: Random) -> bytes:
    """Replace, rename or remove a node of a document, if it is one."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    if not isinstance(document, dict | list) or not document:
        return json.dumps(rng.choice(VALUES)).encode()
    visit(document)
    node, key = rng.choice(places)
    act = rng.random()
    if act < 0.6:
        node[key] = rng.choice(VALUES)
    elif act < 0.7:
        other, there = rng.choice(places)
        node[key] = json.loads(json.dumps(other[there]))
    elif act < 0.85 or isinstance(node, list):
        del node[key]
    else:
        node[str(rng.choice(VALUES))] = node.pop(key)
    return json.dumps(document).encode()


def damage_bytes(content: bytes, rng: Random) -> bytes:
    """Change, remove, repeat or insert bytes."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 1000)))
    act = rng.randrange(6)
    if act == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif act == 1:
        data[at:end] = bytes([rng.choice((0, 1, 127, 128, 255))]) * (end - at)
    elif act == 2:
        data[at:end] = rng.randbytes(end - at)
    elif act == 3:
        del data[at:end]
    elif act == 4:
        data[at:at] = data[at:end] * rng.randint(1, 3)
    else:
        del data[at:]
    return bytes(data)
