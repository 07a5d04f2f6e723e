"""The rules for packed documents and for causal order."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import accumulate, pairwise
from operator import index
from typing import Any, Self

from lvxattn.common.rules import Rule
from lvxattn.common.validation import library

Array = Any


@dataclass(frozen=True)
class Segments(Rule):
    """Documents packed one after the other: queries see the keys of their own document.

    Parameters
    ----------
    q_lengths, kv_lengths : sequence of int
        Numbers of queries and of keys, by document; 0 is allowed.  Their sums are S_Q and S_KV:
        padding is a document of its own, with queries and no keys or the other way round.
    earlier : bool
        Whether the keys of earlier documents are visible, too: text that sees all images before it.

    Raises
    ------
    ValueError, TypeError
        Numbers of documents differ, or a length is negative or not a whole number.

    Examples
    --------
    Two texts, each of which sees its own image:

    >>> import numpy as np
    >>> from lvxattn.reference import Segments, full_attention
    >>> q, k, v = np.zeros((1, 1, 6, 2)), np.zeros((1, 1, 8, 2)), np.arange(8.0).reshape(1, 1, 8, 1)
    >>> out, lse = full_attention(q, k, v, mask=Segments((4, 2), (3, 5)))
    >>> out[0, 0, :, 0].tolist()
    [1.0, 1.0, 1.0, 1.0, 5.0, 5.0]
    """

    q_lengths: Sequence[int]
    kv_lengths: Sequence[int]
    earlier: bool = False

    def __post_init__(self) -> None:
        """Check the lengths."""
        for name in ("q_lengths", "kv_lengths"):
            given = getattr(self, name)
            try:
                lengths = tuple(index(n) for n in given)
            except TypeError:
                raise TypeError(f"{name}: expected whole numbers, got {given!r:.100}") from None
            if any(n < 0 for n in lengths):
                raise ValueError(f"{name}: expected lengths of 0 or more, got {min(lengths)}")
            object.__setattr__(self, name, lengths)
        if len(self.q_lengths) != len(self.kv_lengths):
            raise ValueError(
                f"kv_lengths: expected one for each of the {len(self.q_lengths)} documents of "
                f"q_lengths, got {len(self.kv_lengths)}"
            )

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens_q: Any, cu_seqlens_k: Any, *, earlier: bool = False
    ) -> Self:
        """Return the segments of cumulated lengths, 0 first, as FlashAttention takes them.

        Parameters
        ----------
        cu_seqlens_q, cu_seqlens_k : (documents + 1,) of int
            A sequence, or an array of any library; on a device its values are copied to the host.
        earlier : bool

        Raises
        ------
        ValueError
            They do not begin with 0, or decrease.

        Examples
        --------
        >>> from lvxattn.reference import Segments
        >>> Segments.from_cu_seqlens([0, 4, 6], [0, 3, 8])
        Segments(q_lengths=(4, 2), kv_lengths=(3, 5), earlier=False)
        """
        lengths = []
        for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            ends = _listed(cu_seqlens)
            if ends[:1] != [0] or sorted(ends) != ends:
                raise ValueError(f"{name}: expected 0 and then increasing ends, got {ends!r:.60}")
            lengths.append(tuple(stop - start for start, stop in pairwise(ends)))
        return cls(lengths[0], lengths[1], earlier)

    @classmethod
    def from_position_ids(
        cls, q_positions: Any, kv_positions: Any, *, earlier: bool = False
    ) -> Self:
        """Return the segments of position ids, in which every document begins with 0.

        Parameters
        ----------
        q_positions : (S_Q,) or (1, S_Q) of int
        kv_positions : (S_KV,) or (1, S_KV) of int
        earlier : bool

        Raises
        ------
        ValueError
            They have several rows, or the first position is not 0.

        Examples
        --------
        >>> from lvxattn.reference import Segments
        >>> Segments.from_position_ids([0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4])
        Segments(q_lengths=(4, 2), kv_lengths=(3, 5), earlier=False)
        """
        ends = []
        for name, given in (("q_positions", q_positions), ("kv_positions", kv_positions)):
            positions = _listed(given)
            if len(positions) == 1 and isinstance(positions[0], list):
                positions = positions[0]
            if not positions or positions[0] != 0:
                raise ValueError(
                    f"{name}: expected one row of positions that begins with 0, "
                    f"got {positions!r:.60}"
                )
            starts = [i for i, position in enumerate(positions) if position == 0]
            ends.append([*starts, len(positions)])
        return cls.from_cu_seqlens(ends[0], ends[1], earlier=earlier)

    @cached_property
    def _q_ends(self) -> list[int]:
        return list(accumulate(self.q_lengths))

    @cached_property
    def _kv_ends(self) -> list[int]:
        return list(accumulate(self.kv_lengths))

    def __call__(self, b: Array, h: Array, q_index: Array, kv_index: Array) -> Array:  # noqa: ARG002
        """Return whether queries see keys."""
        of_q, of_kv = _segment(q_index, self._q_ends), _segment(kv_index, self._kv_ends)
        return of_q >= of_kv if self.earlier else of_q == of_kv

    def sees(self, rows: slice, keys: slice) -> bool | None:
        """Return True if all of these rows see all of these keys, False if none does, else None."""
        first = bisect_right(self._q_ends, rows.start)
        last = bisect_right(self._q_ends, rows.stop - 1)
        first_seen = bisect_right(self._kv_ends, keys.start)
        last_seen = bisect_right(self._kv_ends, keys.stop - 1)
        if self.earlier:
            return True if last_seen <= first else None if first_seen <= last else False
        if first == last == first_seen == last_seen:
            return True
        return None if first <= last_seen and first_seen <= last else False

    def reach(self, rows: slice) -> slice:
        """Return the keys of these rows' documents."""
        first = bisect_right(self._q_ends, rows.start)
        last = bisect_right(self._q_ends, rows.stop - 1)
        start = 0 if self.earlier or first == 0 else self._kv_ends[first - 1]
        return slice(start, self._kv_ends[min(last, len(self._kv_ends) - 1)])

    def edges(self, rows: slice) -> Sequence[int]:
        """Return the first rows of documents."""
        return self._q_ends[
            bisect_right(self._q_ends, rows.start) : bisect_right(self._q_ends, rows.stop - 1)
        ]

    def check(self, S_Q: int, S_KV: int) -> None:
        """Raise ValueError if the lengths do not sum to these."""
        for name, lengths, length in (
            ("q_lengths", self.q_lengths, S_Q),
            ("kv_lengths", self.kv_lengths, S_KV),
        ):
            if sum(lengths) != length:
                raise ValueError(
                    f"mask: expected Segments whose {name} sum to {length}, got {sum(lengths)}"
                )


@dataclass(frozen=True)
class Causal(Rule):
    """Query i sees the keys up to i + offset.

    Parameters
    ----------
    offset : int
        ``S_KV - S_Q`` lets the last query see all keys.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import Causal
    >>> Causal(1)(0, 0, np.arange(2)[:, None], np.arange(4)).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0]])
    """

    offset: int = 0

    def __post_init__(self) -> None:
        """Check the offset."""
        try:
            index(self.offset)
        except TypeError:
            raise TypeError(f"offset: expected a whole number, got {self.offset!r:.100}") from None

    def __call__(self, b: Array, h: Array, q_index: Array, kv_index: Array) -> Array:  # noqa: ARG002
        """Return whether queries see keys."""
        return q_index + self.offset >= kv_index

    def sees(self, rows: slice, keys: slice) -> bool | None:
        """Return True if all of these rows see all of these keys, False if none does, else None."""
        if keys.stop - 1 <= rows.start + self.offset:
            return True
        return None if keys.start <= rows.stop - 1 + self.offset else False

    def reach(self, rows: slice) -> slice:
        """Return the keys up to the last row's."""
        return slice(0, max(0, rows.stop + self.offset))


def _listed(x: Any) -> list[Any]:
    """Return a sequence, or an array of any library, as a list of numbers."""
    return list(x.tolist() if hasattr(x, "tolist") else x)


def _segment(index: Array, ends: list[int]) -> Array:
    """Return the document of each index, in the index's library."""
    xp = import_module(library(index))
    at = index.new_tensor(ends) if hasattr(index, "new_tensor") else xp.asarray(ends)
    return xp.searchsorted(at, index, side="right")
