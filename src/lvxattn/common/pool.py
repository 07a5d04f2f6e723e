"""Buffers that a layout keeps from one call to the next."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

# Bytes up to which a buffer serves for anything smaller.
SMALL = 4096


class Kept(NamedTuple):
    """A buffer, its size in bytes, and what else distinguishes it, such as its device."""

    kind: Hashable
    nbytes: int
    buffer: Any


class Pool:
    """Free buffers, by kind.

    A buffer serves for half its size and more, and a small one for anything smaller: the largest
    are not taken for little.  Where none serves, a new one takes the place of a smaller one.  Two
    threads must not use it at once.  A copy, also a pickled one, is empty.

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
        free = self.at_rest.get(kind, [])
        by_size = sorted(range(len(free)), key=lambda i: free[i].nbytes)
        for i in by_size:
            if nbytes <= free[i].nbytes <= max(2 * nbytes, SMALL):
                return free.pop(i)
        if smaller := [i for i in by_size if free[i].nbytes < nbytes]:
            del free[smaller[-1]]
            # An eighth more: text that grows needs more at every step.
            nbytes += nbytes // 8
        return Kept(kind, nbytes, make(nbytes))

    def give(self, kept: Kept) -> None:
        """Return a buffer to the pool."""
        if self.keeps:
            self.at_rest.setdefault(kept.kind, []).append(kept)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes an empty pool."""
        return partial(Pool, keeps=self.keeps), ()
