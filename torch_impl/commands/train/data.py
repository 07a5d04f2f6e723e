"""Clips of real handwriting, and questions about them.

A frame is a picture of 8 x 8 pixels with a handwritten digit, and a marker of 16 bits beside it,
drawn for every frame of every clip; no two frames of a clip have the same.  A question names a
frame by its marker and asks for its digit::

    frame        0        1        2     ...
    picture    [ 7 ]    [ 2 ]    [ 7 ]            "which digit is at 0110...?"     2
    marker    1011...  0110...  0001...

Only the frame determines the answer, and only its marker identifies the frame.  All random numbers
follow from (seed, purpose, step): every rank draws those of the whole batch, a few bytes per frame,
and makes the pictures of its own frames only, so that a clip is the same for any P.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvxattn.common.layout import share

SIDE, BITS, CLASSES = 8, 16, 10
"""Pixels on each side of a picture, bits of a marker, number of possible answers."""

TRAIN, WATCH, TEST = 0, 1, 2
"""Purposes of images and clips: training, looks during it, and the test at the end."""

_SPLIT = (0.8, 0.87)
"""Shares of the shuffled images at which those to watch and those to test begin."""


@dataclass(frozen=True)
class Images:
    """Handwritten digits.

    Attributes
    ----------
    pixels : (n, 8, 8), float32, -1 (paper) to 1 (ink)
    digits : (n,), int64
    numbers : (n,), int64
        Their indices in the data set.
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
        The markers that this rank asks about.
    answers : (B, s_q), int64
        The digits of their frames.
    asked : (B, s_q), int64
        Their frames, counted over all ranks; for pictures, not for the model.
    images : (B, s_q), int64
        Their images' indices in the data set.
    shape : (B, frames, S_Q)
        Of the whole batch: number of clips, frames and questions of each.
    """

    pictures: Tensor
    markers: Tensor
    questions: Tensor
    answers: Tensor
    asked: Tensor
    images: Tensor
    shape: tuple[int, int, int]

    @property
    def total(self) -> int:
        """The number of all ranks' questions about all clips."""
        B, _, S_Q = self.shape
        return B * S_Q


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
        The images that frames show.
    key : (seed, purpose, step)
        The seed of the random numbers.
    shape : (B, frames, S_Q)
        Number of clips, frames and questions of each.
    rank, size : int
        The part and the number of parts; any `size` splits the same batch.
    dtype : torch.dtype
        Dtype of pictures, markers and questions.
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


def least_nbytes(shape: tuple[int, int, int], size: int, dtype: torch.dtype) -> int:
    """Return how many bytes a rank's part of a batch takes at least.

    Parameters
    ----------
    shape : (B, frames, S_Q)
    size : int
        Number of parts.
    dtype : torch.dtype
    """
    B, frames, S_Q = shape
    drawn = 8 * B * (2 * frames + S_Q)  # of the whole batch
    return drawn + B * (frames // size) * (SIDE * SIDE + BITS) * dtype.itemsize


def _signs(codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Write numbers as their bits, -1 or 1, along a new last axis."""
    bits: NDArray[np.int64] = codes[..., None] >> np.arange(BITS) & 1
    return (2 * bits - 1).astype(np.float32)
