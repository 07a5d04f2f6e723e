"""The default video: a camera pans over the photographs that scikit-image ships.

Photograph after photograph comes into view for an equal share of the frames. The centre of the view
moves along sines whose periods (in frames) have no common multiple, the zoom and the roll
likewise, so that the grid of patches never lies on the same place of a photograph twice::

    view(t) = centre + room * sin(2 pi t / period)        t: the frame's number

Frame ``t`` depends on the seed, on ``t`` and on the number of frames alone: each rank makes its own
frames, and any number of ranks makes the same video. Nothing is downloaded.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
"""Files of ``skimage/data`` inside the wheel, in the order in which the camera visits them."""

_PERIODS = (97.3, 61.7, 71.9, 113.1)
"""Periods of the view's column, row, zoom and roll, in frames."""

_ZOOM = 0.10
_ROLL = math.radians(2.5)


def pan_over_photographs(
    first: int,
    last: int,
    frames: int,
    height: int,
    width: int,
    seed: int,
    progress: Callable[[int], None],
) -> NDArray[np.uint8]:
    """Make frames ``first`` to ``last - 1`` of a video of `frames` frames.

    Parameters
    ----------
    first, last : int
        The range of frames to make; empty if they are equal.
    frames : int
        Length of the whole video.
    height, width : int
        Size of a frame in pixels.
    seed : int
        Where on its path the camera starts.
    progress : callable
        Called with the number of frames made so far.

    Returns
    -------
    numpy.ndarray
        (last - first, height, width, 3), uint8.

    Raises
    ------
    ValueError
        If scikit-image or one of its photographs is not installed.
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
