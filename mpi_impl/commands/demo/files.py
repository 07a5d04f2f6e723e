"""Read frames from a video file (PyAV) or from a folder of images (Pillow).

A video is indexed once: the times of its frames in display order, and the keyframes. To read
frames, a rank seeks to the last keyframe before them and decodes from there, so that it decodes its
own part of the file only. Where times cannot be used, because a raw stream has none, or because
files were joined and times start again, frames are counted from the first one.
"""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lvxattn.common.regular_file import open_regular, printable

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video as displayed: size in pixels, and number.

    `pts` are their times in units of the time base, ascending, and `starts` the numbers of the
    keyframes, the first of them 0; both are empty where times cannot be used.
    """

    height: int
    width: int
    frames: int
    pts: list[int]
    starts: list[int]


def index_video(path: Path) -> VideoIndex:
    """List the frames of a video, if possible without decoding them.

    Parameters
    ----------
    path : pathlib.Path
        Any file that PyAV reads.

    Returns
    -------
    VideoIndex

    Raises
    ------
    ValueError
        The file is missing, damaged, truncated, or has no frames.
    """
    import av

    container, stream = _open(path)
    with container:
        packets, end, last, timed = [], 0.0, -inf, True
        with _undamaged(path):
            for packet in container.demux():  # all streams: sound may continue after the pictures
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index == stream.index and packet.size and not packet.is_discard:
                    at = last if packet.dts is None else packet.dts
                    timed = timed and packet.pts is not None and at >= last
                    last = at
                    packets.append((packet.pts or 0, packet.is_keyframe))
        packets.sort()
        if not packets:
            raise ValueError(f"--video: expected at least one frame; {path} has none")
        if len(packets) < stream.frames:
            raise _damaged(path, f"{len(packets)} of the {stream.frames} frames it announces")
        announced = (container.duration or 0) / av.time_base
        if "matroska" in container.format.name and end < 0.9 * announced:
            raise _damaged(path, f"an end after {end:.1f} of the {announced:.1f} s it announces")
        if stream.height * stream.width > (Image.MAX_IMAGE_PIXELS or inf):
            raise _too_large("--video", path)
        if min(stream.height, stream.width) < 1:
            raise _damaged(path, f"frames of {stream.width} x {stream.height} pixels")
        sizes = stream.height, stream.width
    decoded, count = _count(path, every=not timed)
    if _matrix(decoded)[0, 0] == 0:  # it is turned
        sizes = sizes[::-1]
    if not timed:
        return VideoIndex(*sizes, count, [], [])
    pts = [time for time, _ in packets]
    starts = [number for number, (_, key) in enumerate(packets) if key or number == 0]
    return VideoIndex(*sizes, len(pts), pts, starts)


def read_video(
    path: Path,
    picks: Sequence[int],
    index: VideoIndex,
    height: int,
    width: int,
    progress: Callable[[int], None],
) -> NDArray[np.uint8]:
    """Decode some frames of a video.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    picks : sequence of int
        Numbers of the frames wanted, ascending; may be empty.
    index : VideoIndex
        From `index_video`.
    height, width : int
        Size in pixels to which the frames are scaled.
    progress : callable
        Called with the number of frames read so far.

    Returns
    -------
    numpy.ndarray
        (len(picks), height, width, 3), uint8.

    Raises
    ------
    ValueError
        A frame cannot be decoded.
    """
    video = np.empty((len(picks), height, width, 3), np.uint8)
    if not picks:
        return video
    container, stream = _open(path)
    pts, starts = index.pts, index.starts
    with container, _undamaged(path):
        decoded, at = container.decode(stream), 0
        for place, pick in enumerate(picks):
            if starts and starts[bisect_right(starts, pick) - 1] > at:  # one lies between
                decoded = _decode_from(container, stream, pick, pts, starts)
            if pts:
                frame = next((f for f in decoded if f.pts is None or f.pts >= pts[pick]), None)
            else:
                frame = next(islice(decoded, pick - at, None), None)
            if frame is None or frame.is_corrupt:
                found = "an end at" if frame is None else "a broken"
                raise _damaged(path, f"{found} frame {pick} of {index.frames}")
            video[place], at = _shown(frame, height, width), pick + 1
            progress(place + 1)
    return video


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder in the order of their names.

    Raises
    ------
    ValueError
        There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        there = "a file" if folder.exists() else "nothing"
        raise ValueError(f"--images: expected a folder; there is {there} at {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ValueError(
            f"--images: expected a folder with images ({' '.join(_SUFFIXES)}); there are none in "
            f"{folder}"
        )
    return paths


def size_of_image(path: Path) -> tuple[int, int]:
    """Return height and width of an image in pixels, from its header."""
    with _readable(path), open_regular(path) as file, Image.open(file) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # the camera was held upright
        return (image.width, image.height) if turned else (image.height, image.width)


def read_images(
    paths: Sequence[Path], height: int, width: int, progress: Callable[[int], None]
) -> NDArray[np.uint8]:
    """Read images, each scaled to cover the frame and cut to it about its centre.

    Returns
    -------
    numpy.ndarray
        (len(paths), height, width, 3), uint8.

    Raises
    ------
    ValueError
        An image cannot be read.
    """
    video = np.empty((len(paths), height, width, 3), np.uint8)
    for place, path in enumerate(paths):
        with _readable(path), open_regular(path) as file, Image.open(file) as image:
            image.draft("RGB", (width, height))  # JPEG: decode no finer than needed
            picture = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
        video[place] = np.asarray(ImageOps.fit(picture, (width, height)))
        progress(place + 1)
    return video


def _open(path: Path) -> "tuple[InputContainer, VideoStream]":
    """Open a video and find its first stream of frames."""
    try:
        open_regular(path).close()
    except OSError as error:
        raise ValueError(f"--video: {path} cannot be read: {error.strerror}") from None
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"--video: expected PyAV, which reads {path}; it is not installed (pip install av)"
        ) from error
    with _undamaged(path):
        container = av.open(f"file:{path}")  # a name may have a colon, as protocols do
    if not container.streams.video:
        container.close()
        raise ValueError(f"--video: expected a video; {path} holds no stream of frames")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise ValueError(
            f"--video: expected a video in a format that PyAV decodes; it does not know {path}'s"
        )
    stream.thread_type = "SLICE"  # one frame at a time: the other ranks use the other cores
    stream.codec_context.thread_count = 1
    return container, stream


def _count(path: Path, *, every: bool) -> "tuple[VideoFrame | None, int]":
    """Decode the first frame of a video, and count its frames if `every`."""
    import av

    container, stream = _open(path)
    with container:
        first, count = None, 0
        try:
            for frame in container.decode(stream):
                first, count = first or frame, count + 1
                if not every:
                    break
        except av.FFmpegError as error:
            if every:
                raise _damaged(path, error.strerror or str(error)) from error
        if every and not count:
            raise _damaged(path, "no frame that can be decoded")
        return first, count


def _matrix(frame: "VideoFrame | None") -> NDArray[np.int64]:
    """Return the directions in which a frame's axes x and y are displayed: (2, 2), of -1, 0 and 1.

    From the container's display matrix, rounded to quarter turns.
    """
    found: Any = None if frame is None else frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return np.eye(2, dtype=np.int64)
    # x' = m[0] x + m[3] y,  y' = m[1] x + m[4] y; the rest does not affect directions.
    a, b, _, c, d, *_ = np.frombuffer(found, np.int32, 9).astype(np.int64)
    turned = abs(b) > abs(a)
    return np.sign([[0, c or 1], [b, 0]] if turned else [[a or 1, 0], [0, d or 1]])


def _shown(frame: "VideoFrame", height: int, width: int) -> NDArray[np.uint8]:
    """Return a frame's pixels as displayed, scaled: (height, width, 3)."""
    matrix = _matrix(frame)
    turned = matrix[0, 0] == 0
    if turned:
        height, width = width, height
    picture: Any = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    if turned:
        picture = picture.transpose(1, 0, 2)
    to_x, to_y = matrix.sum(axis=1)  # each axis shown is one of the frame's, or its reverse
    shown: NDArray[np.uint8] = picture[::to_y, ::to_x]
    return shown


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of 16-bit or floating grey to 8 bits; Pillow would clip it."""
    if image.mode == "F":
        light = np.nan_to_num(np.asarray(image))
        full = 255 if light.max(initial=0) <= 1 else 1
        return Image.fromarray((light * full).clip(0, 255).astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image, np.int64)
    return Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8))


def _decode_from(
    container: "InputContainer",
    stream: "VideoStream",
    pick: int,
    pts: Sequence[int],
    starts: Sequence[int],
) -> "Iterator[VideoFrame]":
    """Seek to a keyframe from which frame `pick` can be reached, and decode from there."""
    last = bisect_right(starts, pick) - 1
    for start in (last, last - 1, last - 2):  # some containers seek past it, or between two
        if start > 0:
            container.seek(pts[starts[start]], stream=stream)
            decoded = container.decode(stream)
            head = next((frame for frame in decoded if frame.key_frame), None)
            if head is not None and (head.pts is None or head.pts <= pts[pick]):
                return chain([head], decoded)
    container.seek(0)
    return container.decode(stream)


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(f"--video: expected an undamaged video; {path} gives: {found}")


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Raise FFmpeg's errors as ValueErrors that name the file."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise _damaged(path, error.strerror or str(error)) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise Pillow's errors as ValueErrors that name the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that it reads in spite of
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large("--images", path) from None
    except (OSError, ValueError, SyntaxError) as error:
        found = printable(str(getattr(error, "strerror", None) or error))
        text = f"--images: expected images that Pillow reads; {path} gives: {found}"
        raise ValueError(text) from error


def _too_large(option: str, path: Path) -> ValueError:
    most = f"at most {Image.MAX_IMAGE_PIXELS:,} pixels"  # for which Pillow warns
    return ValueError(f"{option}: expected pictures of {most}; those of {path} are larger")
