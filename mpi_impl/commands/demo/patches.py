"""Patches of frames: descriptors (keys), places (values), and noisy copies (queries).

A patch of ``PATCH x PATCH`` pixels is one visual token. Its descriptor is its brightness, averaged
over cells of 2 x 2 pixels, freed of its mean and divided by its norm::

    x = luma cells of the patch             D = (PATCH / 2)^2 = 64 numbers
    k = (x - mean(x)) / max(norm(x - mean(x)), FLAT)

so that the product of two descriptors is the correlation of two patches, at any brightness and
contrast. Patches without texture have descriptors near 0, and attract no query.

Queries are noisy copies of patches, each asked by a rank that does not hold the frame. Every rank
offers some textured patches of its own frames; one all-gather distributes all offers; a rank then
picks from those of the others, and adds noise and another contrast to its copies. The true places
are therefore known, so that answers can be checked::

    rank 0   offers from frames   0-89   --.
    rank 1   offers from frames  90-179  --+--> all ranks --> rank r picks from ranks other than r
    rank 2   offers from frames 180-269  --'
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from lvxattn.common.validation import Communicator

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

_TEXTURE = 15.0
"""Minimum contrast of a patch to be searched for, in grey levels."""


@dataclass(frozen=True)
class Patches:
    """Patches, their places, and the ranks that hold them.

    Attributes
    ----------
    pixels : (n, PATCH, PATCH, 3), uint8
    place : (n, 3), int64
        Frame, row and column of each.
    holder : (n,), int64
    """

    pixels: NDArray[np.uint8]
    place: NDArray[np.int64]
    holder: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of patches."""
        return len(self.place)

    def __getitem__(self, chosen: NDArray[np.integer] | NDArray[np.bool_]) -> "Patches":
        """Return the patches chosen by an index array or a mask."""
        return Patches(self.pixels[chosen], self.place[chosen], self.holder[chosen])


def describe(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute the descriptors of all patches of frames.

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
    """Compute each patch's standard deviation in grey levels: (frames, rows, cols)."""
    deviation: NDArray[np.float32] = _cells(pixels).std(axis=-1)
    return deviation


def places(first: int, last: int, rows: int, cols: int) -> NDArray[np.float32]:
    """Return the place of each patch of frames ``first`` to ``last - 1``.

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


def choose_queries(
    frames: NDArray[np.uint8],
    first: int,
    wanted: int,
    comm: Communicator,
    rng: np.random.Generator,
) -> tuple[Patches, NDArray[np.uint8]]:
    """Choose this rank's queries. Collective: every rank of comm calls this.

    Parameters
    ----------
    frames : numpy.ndarray
        (n, height, width, 3), uint8: this rank's frames.
    first : int
        Number of the first of them.
    wanted : int
        Number of queries of all ranks together.
    comm : Communicator
    rng : numpy.random.Generator
        This rank's.

    Returns
    -------
    truth : Patches
        The patches searched for, as their holders see them. Fewer than this rank's share of
        `wanted`, possibly none, if the video has little texture.
    seen : numpy.ndarray
        (n, PATCH, PATCH, 3), uint8: the noisy copies.
    """
    offered = _offer(frames, first, -(-wanted // comm.size), comm.rank, rng)
    gathered = comm.allgather(offered)
    pool = Patches(
        *(np.concatenate([getattr(patches, field.name) for patches in gathered])
          for field in fields(Patches))
    )  # fmt: skip
    others = np.flatnonzero(pool.holder != comm.rank)
    if len(others) == 0:  # one rank, or all frames are here
        others = np.arange(len(pool))
    share = wanted // comm.size + (comm.rank < wanted % comm.size)
    truth = pool[rng.permutation(others)[:share]]
    seen = np.empty_like(truth.pixels)
    for n, patch in enumerate(truth.pixels):
        seen[n] = degrade(patch, rng)
    return truth, seen


def _offer(
    frames: NDArray[np.uint8], first: int, count: int, rank: int, rng: np.random.Generator
) -> Patches:
    """Pick up to `count` textured patches, from as many different frames as possible."""
    textured = rng.permutation(np.argwhere(contrast(frames) >= _TEXTURE))  # frame, row, column
    order = np.argsort(textured[:, 0], kind="stable")
    number_in_frame = np.empty(len(textured), np.int64)
    starts = np.searchsorted(textured[order, 0], textured[order, 0])
    number_in_frame[order] = np.arange(len(textured)) - starts
    place = textured[np.argsort(number_in_frame, kind="stable")[:count]]
    pixels = np.empty((len(place), PATCH, PATCH, 3), np.uint8)
    for n, (frame, row, col) in enumerate(place * (1, PATCH, PATCH)):
        pixels[n] = frames[frame, row : row + PATCH, col : col + PATCH]
    return Patches(pixels, place + np.array([first, 0, 0]), np.full(len(place), rank))


def _cells(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return brightness averaged over cells, patch by patch: (frames, rows, cols, D)."""
    frames, height, width, _ = pixels.shape
    rows, cols, side = height // PATCH, width // PATCH, PATCH // _CELL
    cells = np.empty((frames, rows, cols, D), np.float32)
    for frame in range(frames):  # frame by frame, so that the temporaries stay in the cache
        luma = pixels[frame].astype(np.float32) @ _LUMA  # (height, width)
        # (rows, side, cols, side)
        fine = luma.reshape(rows, side, _CELL, cols, side, _CELL).mean(axis=(2, 5))
        cells[frame] = fine.transpose(0, 2, 1, 3).reshape(rows, cols, D)  # (rows, cols, D)
    return cells
