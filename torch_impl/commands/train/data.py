"""Clips of real handwriting, and questions about them.

A frame is a picture of 8 x 8 pixels with a handwritten digit, and a marker of 16 bits beside it,
drawn anew for every frame of every clip; no two frames of a clip have the same.  A question names a
frame by its marker and asks for its digit::

    frame        0        1        2     ...
    picture    [ 7 ]    [ 2 ]    [ 7 ]            "which digit is at 0110...?"     2
    marker    1011...  0110...  0001...

Nothing but the frame tells the answer, and nothing but its marker tells the frame.  Everything that
is drawn follows from (seed, purpose, step): every rank draws the whole batch's numbers, a few bytes
a frame, and makes the pictures of its own frames only, so that a clip is the same on any P.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvxattn.common.layout import share

SIDE, BITS, CLASSES = 8, 16, 10
"""Pixels on each side of a picture, bits of a marker, and answers that there are."""

TRAIN, WATCH, TEST = 0, 1, 2
"""What images and clips are for: training, looks at how it goes, and the answer at the end."""

_SPLIT = (0.8, 0.87)
"""Where, in the shuffled images, those to watch begin and those to test with."""


@dataclass(frozen=True)
class Images:
    """Handwritten digits.

    Attributes
    ----------
    pixels : (n, 8, 8), float32, -1 (paper) to 1 (ink)
    digits : (n,), int64
    numbers : (n,), int64
        Which images of the data set these are.
    """

    pixels: NDArray[np.float32]
    digits: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.digits)


@dataclass(frozen=True)
class Clips:
    """One rank's part of a batch of clips and of the questions about them.

    Attributes
    ----------
    pictures : (B, f, 8, 8)
    markers : (B, f, 16), -1 or 1
        This rank's frames.
    questions : (B, s_q, 16), -1 or 1
        Markers that this rank asks about.
    answers : (B, s_q), int64
        The digits to be found.
    asked : (B, s_q), int64
        The frames that they are in, counted over all ranks; for looking at, not for the model.
    images : (B, s_q), int64
        Which images of the data set these frames show.
    shape : (B, frames, S_Q)
        Of the whole batch: clips, the frames of each, and the questions about each.
    """

    pictures: Tensor
    markers: Tensor
    questions: Tensor
    answers: Tensor
    asked: Tensor
    images: Tensor
    shape: tuple[int, int, int]


def load_images() -> tuple[Images, Images, Images]:
    """Return scikit-learn's digits, 1,797 of them, in three parts that share no image.

    Returns
    -------
    train, watch, test : Images
        1,437, 126 and 234; the same on every call, whatever a run's seed.

    Raises
    ------
    ModuleNotFoundError
        scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images / 8 - 1).astype(np.float32)
    digits = found.target.astype(np.int64)
    shuffled = np.random.default_rng(0).permutation(len(digits))
    cuts = [int(part * len(digits)) for part in _SPLIT]
    train, watch, test = (
        Images(pixels[numbers], digits[numbers], numbers) for numbers in np.split(shuffled, cuts)
    )
    return train, watch, test


def make_clips(
    images: Images,
    key: tuple[int, int, int],
    shape: tuple[int, int, int],
    rank: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Clips:
    """Make a rank's part of a batch.  Not collective.

    Parameters
    ----------
    images : Images
        What the frames show.
    key : (seed, purpose, step)
        What the draw follows from.
    shape : (B, frames, S_Q)
        Clips, the frames of each, and the questions about each.
    rank, size : int
        Whose part of how many; any `size` cuts the same batch.
    dtype : torch.dtype
        Of pictures, markers and questions.
    """
    B, frames, S_Q = shape
    rng = np.random.default_rng(key)
    shown = rng.integers(0, len(images), (B, frames))
    codes = np.stack([rng.choice(1 << BITS, frames, replace=False) for _ in range(B)])
    asked = rng.integers(0, frames, (B, S_Q))

    here, mine = share(frames, rank, size), share(S_Q, rank, size)
    asked = asked[:, mine]
    of = np.take_along_axis(shown, asked, axis=1)
    return Clips(
        pictures=torch.from_numpy(images.pixels[shown[:, here]]).to(dtype),
        markers=torch.from_numpy(_signs(codes[:, here])).to(dtype),
        questions=torch.from_numpy(_signs(np.take_along_axis(codes, asked, axis=1))).to(dtype),
        answers=torch.from_numpy(images.digits[of]),
        asked=torch.from_numpy(asked.astype(np.int64)),
        images=torch.from_numpy(images.numbers[of]),
        shape=shape,
    )


def _signs(codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Write numbers as their bits, -1 or 1, along a new last axis."""
    bits: NDArray[np.int64] = codes[..., None] >> np.arange(BITS) & 1
    return (2 * bits - 1).astype(np.float32)
