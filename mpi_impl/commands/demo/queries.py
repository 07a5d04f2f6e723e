"""Queries: noisy copies of patches, each asked by a rank that does not hold the frame.

Every rank offers some textured patches of its own frames; one all-gather shows all offers to all; a
rank then picks from those of the others, and spoils its copies with noise and another contrast.
What it looks for is therefore known, which lets the answers be checked::

    rank 0   offers from frames   0-89   --.
    rank 1   offers from frames  90-179  --+--> all ranks --> rank r picks from ranks other than r
    rank 2   offers from frames 180-269  --'
"""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from lvxattn.mpi_impl.commands.demo.descriptors import PATCH, contrast, degrade

_TEXTURE = 15.0
"""Least contrast of a patch that is worth a search, in grey levels."""


@dataclass(frozen=True)
class Patches:
    """Some patches, where they are, and the ranks that hold them.

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


def choose_queries(
    frames: NDArray[np.uint8],
    first: int,
    wanted: int,
    comm: MPI.Intracomm,
    rng: np.random.Generator,
) -> tuple[Patches, NDArray[np.uint8]]:
    """Choose what this rank searches for. Collective: every rank of comm calls this.

    Parameters
    ----------
    frames : numpy.ndarray
        (n, height, width, 3), uint8: this rank's frames.
    first : int
        Number of the first of them.
    wanted : int
        How many queries all ranks should ask together.
    comm : mpi4py.MPI.Intracomm
    rng : numpy.random.Generator
        This rank's.

    Returns
    -------
    truth : Patches
        What is searched for, as its holders see it. Fewer than this rank's share of `wanted`, and
        none at all in the end, if the video has little texture.
    seen : numpy.ndarray
        (n, PATCH, PATCH, 3), uint8: the noisy copies.
    """
    offered = _offer(frames, first, -(-wanted // comm.size), comm.rank, rng)
    gathered = comm.allgather(offered)
    pool = Patches(
        np.concatenate([patches.pixels for patches in gathered]),
        np.concatenate([patches.place for patches in gathered]),
        np.concatenate([patches.holder for patches in gathered]),
    )
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
