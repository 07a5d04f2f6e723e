"""Sources of frames: the default video, a video file, or a folder of images.

Rank 0 opens the source and broadcasts it; then each rank reads its own frames only. A frame is cut
into rows x cols of about 300 patches, in the proportions of the first picture.

The default video is a camera panning over the photographs that scikit-image ships. Photograph after
photograph comes into view for an equal share of the frames. The centre of the view moves along
sines whose periods (in frames) have no common multiple, zoom and roll likewise, so that the grid of
patches never lies on the same place of a photograph twice::

    view(t) = centre + room * sin(2 pi t / period)        t: the frame's number

Frame ``t`` depends only on the seed, on ``t`` and on the number of frames: each rank makes its own
frames, and any number of ranks makes the same video. Nothing is downloaded.
"""

import importlib.util
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lvxattn.mpi_impl.commands.demo.files import (
    VideoIndex,
    index_video,
    list_images,
    read_images,
    read_video,
    size_of_image,
)
from lvxattn.mpi_impl.commands.demo.patches import PATCH

FRAMES = 360
"""Default number of frames: 108,000 patches."""

_PATCHES = 300
_DISTINCT = 1000
"""Maximum length of the default video for few of its patches to look alike."""

PHOTOGRAPHS = (
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "gravel.png",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "retina.jpg",
)
"""Files of ``skimage/data`` in the wheel, in the order of the camera."""

_PERIODS = (97.3, 61.7, 71.9, 113.1)
"""Periods of the view's column, row, zoom and roll, in frames."""

_ZOOM = 0.10
_ROLL = math.radians(2.5)


Frames = NDArray[np.uint8]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Source:
    """A video whose frames can be read on any rank; can be pickled.

    Attributes
    ----------
    title : str
        Description for the report.
    frames : int
        Number of frames.
    rows, cols : int
        Patches of a frame, from top to bottom and from left to right.
    reader : callable
        Reads frames: arguments ``first, last, height, width, progress``.
    distinct : bool
        Whether few patches look alike.
    """

    title: str
    frames: int
    rows: int
    cols: int
    reader: Callable[[int, int, int, int, Progress], Frames]
    distinct: bool = False

    def read(self, first: int, last: int, progress: Progress) -> Frames:
        """Read frames ``first`` to ``last - 1``: (last - first, rows * PATCH, cols * PATCH, 3)."""
        return self.reader(first, last, self.rows * PATCH, self.cols * PATCH, progress)


def open_source(options: Namespace) -> Source:
    """Open the source that the command line names; on rank 0.

    Parameters
    ----------
    options : argparse.Namespace
        ``video``, ``images`` (a path or None each), ``frames`` (an int or None) and ``seed``.

    Returns
    -------
    Source
        With at most ``options.frames`` frames, evenly spaced if there are more.

    Raises
    ------
    ValueError
        The file or folder is missing, damaged or empty.
    """
    wanted = options.frames or FRAMES
    if options.video is not None:
        path = Path(options.video)
        index = index_video(path)
        picks = _spread(index.frames, wanted)
        taken = f", {len(picks):,} of its {index.frames:,} frames" * (len(picks) < index.frames)
        grid = _grid(index.height, index.width)
        return Source(
            path.name + taken, len(picks), *grid, partial(_read_video, path, picks, index)
        )
    if options.images is not None:
        folder = Path(options.images)
        there = list_images(folder)
        paths = [there[n] for n in _spread(len(there), wanted)]
        title, grid = f"the images in {folder.resolve().name}", _grid(*size_of_image(there[0]))
        return Source(title, len(paths), *grid, partial(_read_images, paths))
    return default_video(wanted, options.seed)


def default_video(frames: int, seed: int) -> Source:
    """Return the default video."""
    title = "a camera pans over scikit-image's photographs"
    reader = partial(pan_over_photographs, frames=frames, seed=seed)
    return Source(title, frames, 15, 20, reader, distinct=frames <= _DISTINCT)


def pan_over_photographs(
    first: int, last: int, height: int, width: int, progress: Progress, *, frames: int, seed: int
) -> Frames:
    """Make frames ``first`` to ``last - 1`` of a video of `frames` frames.

    Parameters
    ----------
    first, last : int
        The range of frames to make; empty if they are equal.
    height, width : int
        Size of a frame in pixels.
    progress : callable
        Called with the number of frames made so far.
    frames : int
        Length of the whole video.
    seed : int
        Selects where on its path the camera starts.

    Returns
    -------
    numpy.ndarray
        (last - first, height, width, 3), uint8.

    Raises
    ------
    ValueError
        scikit-image or one of its photographs is not installed.
    """
    video = np.empty((last - first, height, width, 3), np.uint8)
    phases = np.random.default_rng(seed).uniform(0, 2 * math.pi, len(_PERIODS))
    shown, photograph = -1, Image.new("RGB", (1, 1))
    for place, frame in enumerate(range(first, last)):
        number = frame * len(PHOTOGRAPHS) // frames
        if number != shown:
            shown, photograph = number, _load(PHOTOGRAPHS[number], height, width)
        sines = [
            math.sin(2 * math.pi * frame / period + phase)
            for period, phase in zip(_PERIODS, phases, strict=True)
        ]
        video[place] = _view(photograph, height, width, *sines)
        progress(place + 1)
    return video


def _read_video(
    path: Path,
    picks: list[int],
    index: VideoIndex,
    first: int,
    last: int,
    height: int,
    width: int,
    progress: Progress,
) -> Frames:
    return read_video(path, picks[first:last], index, height, width, progress)


def _read_images(
    paths: list[Path], first: int, last: int, height: int, width: int, progress: Progress
) -> Frames:
    return read_images(paths[first:last], height, width, progress)


def _grid(height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of about ``_PATCHES`` patches in the proportions of a picture."""
    cols = min(max(round(math.sqrt(_PATCHES * width / height)), 4), _PATCHES // 4)
    return round(_PATCHES / cols), cols


def _spread(there: int, wanted: int) -> list[int]:
    """Return at most `wanted` of the numbers below `there`, evenly spaced."""
    taken = min(there, wanted)
    return [n * there // taken for n in range(taken)]


def _load(name: str, height: int, width: int) -> Image.Image:
    """Load a photograph, scaled so that the widest view fits into it with room to move."""
    spec = importlib.util.find_spec("skimage")  # finds the folder; does not import the package
    if spec is None or spec.origin is None:
        raise ValueError(
            "the default video: expected scikit-image, whose photographs it shows; it is not "
            "installed (pip install scikit-image, or give --video FILE or --images DIR)"
        )
    path = Path(spec.origin).parent / "data" / name
    try:
        with Image.open(path) as file:
            photograph = file.convert("RGB")
    except OSError as error:
        raise ValueError(
            f"the default video: expected scikit-image's photograph {path}; got: {error}"
        ) from error
    factor = max(1.6 * height / photograph.height, 1.5 * width / photograph.width)
    size = round(photograph.width * factor), round(photograph.height * factor)
    return photograph.resize(size, Image.Resampling.LANCZOS)


def _view(
    photograph: Image.Image,
    height: int,
    width: int,
    column_sine: float,
    row_sine: float,
    zoom_sine: float,
    roll_sine: float,
) -> NDArray[np.uint8]:
    """Sample the photograph, bilinearly, where the camera looks; (height, width, 3)."""
    zoom = 1 + _ZOOM * zoom_sine
    roll = _ROLL * roll_sine
    cos, sin = zoom * math.cos(roll), zoom * math.sin(roll)
    half_x = (abs(cos) * width + abs(sin) * height) / 2 + 1  # of the rolled view's bounding box
    half_y = (abs(sin) * width + abs(cos) * height) / 2 + 1
    centre_x = photograph.width / 2 + (photograph.width / 2 - half_x) * column_sine
    centre_y = photograph.height / 2 + (photograph.height / 2 - half_y) * row_sine
    from_view = (
        *(cos, -sin, centre_x - (cos * width - sin * height) / 2),
        *(sin, cos, centre_y - (sin * width + cos * height) / 2),
    )
    view = photograph.transform(
        (width, height), Image.Transform.AFFINE, from_view, Image.Resampling.BILINEAR
    )
    return np.asarray(view)
