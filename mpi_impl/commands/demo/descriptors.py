"""Patches of frames, what they look like (keys) and where they are (values).

A patch of ``PATCH x PATCH`` pixels is one visual token. Its descriptor is its brightness, averaged
over cells of 2 x 2 pixels, freed of its mean and divided by its norm::

    x = luma cells of the patch             D = (PATCH / 2)^2 = 64 numbers
    k = (x - mean(x)) / max(norm(x - mean(x)), FLAT)

so that the product of two descriptors is the correlation of two patches, whatever their brightness
and contrast. Patches without texture have descriptors near 0, and attract no query.
"""

import numpy as np
from numpy.typing import NDArray

PATCH = 16
"""Side of a patch, in pixels."""

_CELL = 2
D = (PATCH // _CELL) ** 2
"""Length of a descriptor."""

_FLAT = 2.0 * D**0.5
"""Norm below which a patch counts as flat: a standard deviation of 2 grey levels."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

NOISE = 14.0
"""Standard deviation of the noise on a query, in grey levels."""


def describe(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute the descriptors of all patches of some frames.

    Parameters
    ----------
    pixels : numpy.ndarray
        (frames, rows * PATCH, cols * PATCH, 3), uint8.

    Returns
    -------
    numpy.ndarray
        (frames, rows, cols, D), float32, each of norm 1 (or less, where a patch is flat).
    """
    cells = _cells(pixels)
    cells -= cells.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(cells, axis=-1, keepdims=True)
    k: NDArray[np.float32] = cells / np.maximum(norm, np.float32(_FLAT))
    return k


def contrast(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Take each patch's standard deviation in grey levels: (frames, rows, cols)."""
    deviation: NDArray[np.float32] = _cells(pixels).std(axis=-1)
    return deviation


def places(first: int, last: int, rows: int, cols: int) -> NDArray[np.float32]:
    """Say where each patch of frames ``first`` to ``last - 1`` is.

    Returns
    -------
    numpy.ndarray
        (last - first, rows, cols, 3), float32: frame, row, column, each counted from 0.
    """
    axes = np.arange(first, last), np.arange(rows), np.arange(cols)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)


def degrade(patch: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Make a noisy copy of a patch, with another brightness and contrast; same shape."""
    middle = patch.mean()
    seen = middle + rng.uniform(-25, 25) + rng.uniform(0.6, 1.1) * (patch - middle)
    seen += rng.normal(0, NOISE, patch.shape)
    noisy: NDArray[np.uint8] = np.clip(np.rint(seen), 0, 255).astype(np.uint8)
    return noisy


def _cells(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Brightness averaged over cells, patch by patch: (frames, rows, cols, D)."""
    frames, height, width, _ = pixels.shape
    rows, cols, side = height // PATCH, width // PATCH, PATCH // _CELL
    cells = np.empty((frames, rows, cols, D), np.float32)
    for frame in range(frames):  # frame by frame, so that the temporaries stay in the cache
        luma = pixels[frame].astype(np.float32) @ _LUMA  # (height, width)
        fine = luma.reshape(rows, side, _CELL, cols, side, _CELL).mean(axis=(2, 5))
        cells[frame] = fine.transpose(0, 2, 1, 3).reshape(rows, cols, D)
    return cells
