"""Where the frames come from: the default video, a video file, or a folder of images.

Rank 0 looks at the source and tells the others what it saw; then each rank reads its own frames,
and no others. A frame is cut into rows x cols of about 300 patches, in the proportions of the first
picture.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from lvxattn.mpi_impl.commands.demo.camera import pan_over_photographs
from lvxattn.mpi_impl.commands.demo.descriptors import PATCH
from lvxattn.mpi_impl.commands.demo.files import (
    VideoIndex,
    index_video,
    list_images,
    read_images,
    read_video,
    size_of_image,
)

FRAMES = 360
"""Frames searched unless the user says otherwise: 108,000 patches."""

_PATCHES = 300

Progress = Callable[[int], None]


class Source(Protocol):
    """A video whose frames can be read from anywhere; can be pickled."""

    @property
    def title(self) -> str:
        """What is searched, in words."""

    @property
    def frames(self) -> int:
        """Number of frames."""

    @property
    def rows(self) -> int:
        """Patches from the top of a frame to its bottom."""

    @property
    def cols(self) -> int:
        """Patches from the left of a frame to its right."""

    def read(self, first: int, last: int, progress: Progress) -> NDArray[np.uint8]:
        """Read frames ``first`` to ``last - 1``: (last - first, rows, cols) patches of pixels."""


def open_source(options: Namespace) -> Source:
    """Look at the source that the command line names; rank 0 calls this.

    Parameters
    ----------
    options : argparse.Namespace
        ``video``, ``images`` (a path or None each), ``frames`` (an int or None) and ``seed``.

    Returns
    -------
    Source
        Of at most ``options.frames`` frames, evenly spaced if there are more.

    Raises
    ------
    ValueError
        If the file or folder is missing, damaged or empty.
    """
    wanted = options.frames or FRAMES
    if options.video is not None:
        index = index_video(Path(options.video))
        rows, cols = _grid(index.height, index.width)
        return _Film(Path(options.video), rows, cols, _spread(index.frames, wanted), index)
    if options.images is not None:
        paths = list_images(Path(options.images))
        rows, cols = _grid(*size_of_image(paths[0]))
        return _Album(
            Path(options.images), rows, cols, [paths[n] for n in _spread(len(paths), wanted)]
        )
    return Pan(frames=wanted, seed=options.seed)


@dataclass(frozen=True)
class Pan:
    """The default video; up to `DISTINCT` frames, few of its patches look alike."""

    DISTINCT: ClassVar[int] = 1000

    frames: int
    seed: int
    rows: int = 15
    cols: int = 20

    @property
    def title(self) -> str:
        """What is searched, in words."""
        return "a camera pans over scikit-image's photographs"

    def read(self, first: int, last: int, progress: Progress) -> NDArray[np.uint8]:
        """Read frames ``first`` to ``last - 1``."""
        height, width = self.rows * PATCH, self.cols * PATCH
        return pan_over_photographs(first, last, self.frames, height, width, self.seed, progress)


@dataclass(frozen=True)
class _Film:
    """A video file: `picks` are the frames taken."""

    path: Path
    rows: int
    cols: int
    picks: list[int]
    index: VideoIndex

    @property
    def title(self) -> str:
        """What is searched, in words."""
        return _of(self.path.name, len(self.picks), self.index.frames)

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.picks)

    def read(self, first: int, last: int, progress: Progress) -> NDArray[np.uint8]:
        """Read frames ``first`` to ``last - 1``."""
        height, width = self.rows * PATCH, self.cols * PATCH
        picks = self.picks[first:last]
        return read_video(self.path, picks, self.index, height, width, progress)


@dataclass(frozen=True)
class _Album:
    """A folder of images, in the order of their names."""

    folder: Path
    rows: int
    cols: int
    paths: list[Path]

    @property
    def title(self) -> str:
        """What is searched, in words."""
        return f"the images in {self.folder.resolve().name}"

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.paths)

    def read(self, first: int, last: int, progress: Progress) -> NDArray[np.uint8]:
        """Read frames ``first`` to ``last - 1``."""
        return read_images(self.paths[first:last], self.rows * PATCH, self.cols * PATCH, progress)


def _grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of about ``_PATCHES`` patches in the proportions of a picture."""
    cols = min(max(round(math.sqrt(_PATCHES * width / height)), 4), _PATCHES // 4)
    return round(_PATCHES / cols), cols


def _spread(there: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `there`, evenly spaced."""
    taken = min(there, wanted)
    return [n * there // taken for n in range(taken)]


def _of(name: str, taken: int, there: int) -> str:
    return name if taken == there else f"{name}, {taken:,} of its {there:,} frames"
