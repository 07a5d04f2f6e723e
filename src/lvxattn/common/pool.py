"""Buffers that a layout keeps from one call to the next."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple


class Kept(NamedTuple):
    """A buffer, its size in bytes, and what else distinguishes it, such as its device."""

    kind: Hashable
    nbytes: int
    buffer: Any


class Pool:
    """Free buffers, by kind.

    A buffer serves for any number of bytes up to its size.  Where none is large enough, a new one
    takes the place of a smaller one, so that there are never more than were in use at once.

    Parameters
    ----------
    keeps : bool
        Whether returned buffers are kept.  Not where a layout serves one call only: a graph of
        PyTorch would keep them until the backward.

    Examples
    --------
    >>> from lvxattn.common.pool import Pool
    >>> pool = Pool()
    >>> pool.give(pool.take("host", 800, bytearray))
    >>> pool.take("host", 500, bytearray).nbytes
    800
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.at_rest: dict[Hashable, list[Kept]] = {}

    def take(self, kind: Hashable, nbytes: int, make: Callable[[int], Any]) -> Kept:
        """Return a buffer of at least `nbytes`, which the pool no longer has.

        Parameters
        ----------
        kind : hashable
        nbytes : int
        make : callable
            Makes a buffer of a number of bytes.
        """
        sizes = [kept.nbytes for kept in self.at_rest.get(kind, [])]
        if not sizes:
            return Kept(kind, nbytes, make(nbytes))
        if max(sizes) >= nbytes:
            smallest = min(size for size in sizes if size >= nbytes)
            return self.at_rest[kind].pop(sizes.index(smallest))
        del self.at_rest[kind][sizes.index(max(sizes))]
        # An eighth more: text that grows needs more at every step.
        nbytes += nbytes // 8
        return Kept(kind, nbytes, make(nbytes))

    def give(self, kept: Kept) -> None:
        """Return a buffer to the pool."""
        if self.keeps:
            self.at_rest.setdefault(kept.kind, []).append(kept)
