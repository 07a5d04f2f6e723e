"""Read frames from a video file (PyAV) or from a folder of images (Pillow).

A video is indexed once: the times of its frames, in the order of showing, and which of them are
keyframes. Whoever wants frames then seeks to the last keyframe before them and decodes from there,
so that a rank decodes its own part of the file only.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class VideoIndex:
    """What a video holds: sizes in pixels, `pts` and keyframes by number of frame."""

    height: int
    width: int
    pts: list[int]
    starts: list[int]


def index_video(path: Path) -> VideoIndex:
    """List the frames of a video without decoding them.

    Parameters
    ----------
    path : pathlib.Path
        Any file that PyAV reads.

    Returns
    -------
    VideoIndex
        ``pts`` are the times of its frames in units of its time base, ascending; ``starts`` are the
        numbers of the keyframes, the first of them 0.

    Raises
    ------
    ValueError
        If the file is missing, damaged, cut short, or has no frames.
    """
    import av

    container, stream = _open(path)
    with container:
        try:
            packets, end = [], 0.0
            for packet in container.demux():  # all streams: sound may go on where pictures end
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    if packet.stream_index == stream.index and not packet.is_discard:
                        packets.append((packet.pts, packet.is_keyframe))
        except av.FFmpegError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        packets.sort()
        if not packets:
            raise ValueError(f"--video: expected at least one frame; {path} has none")
        if len(packets) < stream.frames:
            raise _damaged(path, f"{len(packets)} of the {stream.frames} frames it announces")
        announced = (container.duration or 0) / av.time_base
        if "matroska" in container.format.name and end < 0.9 * announced:
            raise _damaged(path, f"an end after {end:.1f} of the {announced:.1f} s it announces")
        if min(stream.height, stream.width) < 1:
            raise _damaged(path, f"frames of {stream.width} x {stream.height} pixels")
        pts = [time for time, _ in packets]
        starts = [number for number, (_, key) in enumerate(packets) if key or number == 0]
        return VideoIndex(stream.height, stream.width, pts, starts)


def read_video(
    path: Path,
    picks: Sequence[int],
    pts: Sequence[int],
    starts: Sequence[int],
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
    pts, starts : sequence of int
        Its times and keyframes, from `index_video`.
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
        If a frame cannot be decoded.
    """
    import av

    video = np.empty((len(picks), height, width, 3), np.uint8)
    if not picks:
        return video
    container, stream = _open(path)
    with container:
        try:
            decoded, at = container.decode(stream), 0
            for place, pick in enumerate(picks):
                if starts[bisect_right(starts, pick) - 1] > at:  # a keyframe lies between
                    decoded = _decode_from(container, stream, pick, pts, starts)
                frame = next((f for f in decoded if f.pts is None or f.pts >= pts[pick]), None)
                if frame is None or frame.is_corrupt:
                    found = "an end at" if frame is None else "a broken"
                    raise _damaged(path, f"{found} frame {pick} of {len(pts)}")
                picture = frame.reformat(width=width, height=height, format="rgb24")
                video[place], at = picture.to_ndarray(), pick + 1
                progress(place + 1)
        except av.FFmpegError as error:
            raise _damaged(path, error.strerror or str(error)) from error
    return video


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder in the order of their names.

    Raises
    ------
    ValueError
        If there is no such folder, or no image in it.
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
    """Height and width of an image in pixels, from its header."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # the camera was held upright
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


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
        If an image cannot be read.
    """
    video = np.empty((len(paths), height, width, 3), np.uint8)
    for place, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (width, height))  # JPEG: decode no finer than needed
                picture = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from error
        video[place] = np.asarray(ImageOps.fit(picture, (width, height)))
        progress(place + 1)
    return video


def _open(path: Path) -> "tuple[InputContainer, VideoStream]":
    """Open a video and find its first stream of frames."""
    if not path.is_file():
        there = "a folder" if path.is_dir() else "nothing"
        raise ValueError(f"--video: expected a video file; there is {there} at {path}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"--video: expected a file that can be read; {path} may not be")
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"--video: expected PyAV, which reads {path}; it is not installed (pip install av)"
        ) from error
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"--video: expected a video; {path} holds no stream of frames")
    stream = container.streams.video[0]
    stream.thread_type = "SLICE"  # one frame at a time: the other ranks use the other cores
    stream.codec_context.thread_count = 1
    return container, stream


def _decode_from(
    container: "InputContainer",
    stream: "VideoStream",
    pick: int,
    pts: Sequence[int],
    starts: Sequence[int],
) -> "Iterator[VideoFrame]":
    """Seek to a keyframe from which frame `pick` can be reached, and decode from there."""
    last = bisect_right(starts, pick) - 1
    for start in (last, last - 1, last - 2):  # some containers lead past it, or between two
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


def _unreadable(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"--images: expected images that Pillow reads; {path} gives: {error}")
