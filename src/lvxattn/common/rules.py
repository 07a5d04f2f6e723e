"""Masks that know their own structure: what is hidden from a block is neither computed nor sent.

A rule is a callable mask, ``rule(b, h, q_index, kv_index) -> bool``, that also says of a block of
queries and keys whether all of it is visible, none or some:

    Segments((4, 2), (3, 5))            keys  0 1 2 | 3 4 5 6 7
                              queries 0 .. 3  + + + | . . . . .       + all visible
                              queries 4 .. 5  . . . | + + + + +       . none

`visible_parts` cuts a block into the parts that must be computed; a layout lets a block travel to
those ranks only on which it meets something visible (`Layout.stops`).
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

Array = Any

# Parts of at most SMALLEST x SMALLEST scores are not cut further: a kernel call has its cost.
SMALLEST = 128
_SUCH = "such as a frozen dataclass of numbers and tuples"


class Rule(ABC):
    """Base class of masks that know their own structure.

    A subclass is pure: equal rules hide the same, on every rank.  It is best a frozen dataclass,
    which ranks can compare.  Indices are global: of all ranks' queries and of all ranks' keys.

    Examples
    --------
    Query i sees the keys i - width to i + width:

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from lvxattn.reference import Rule
    >>> @dataclass(frozen=True)
    ... class Window(Rule):
    ...     width: int
    ...
    ...     def __call__(self, b, h, q_index, kv_index):
    ...         return abs(q_index - kv_index) <= self.width
    ...
    ...     def sees(self, rows, keys):
    ...         nearest = max(rows.start - keys.stop, keys.start - rows.stop) + 1
    ...         farthest = max(rows.stop - keys.start, keys.stop - rows.start) - 1
    ...         if nearest > self.width:
    ...             return False
    ...         return True if farthest <= self.width else None
    >>> Window(1)(0, 0, np.arange(3)[:, None], np.arange(4)).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1]])
    >>> window = Window(100)
    >>> many = slice(0, 50), slice(50, 300), slice(150, 300)
    >>> [window.sees(slice(0, 50), keys) for keys in many]
    [True, None, False]
    """

    @abstractmethod
    def __call__(self, b: Array, h: Array, q_index: Array, kv_index: Array) -> Array:
        """Return whether queries see keys, on broadcastable arrays of indices."""

    @abstractmethod
    def sees(self, rows: slice, keys: slice) -> bool | None:
        """Return True if all of these rows see all of these keys, False if none does, else None.

        Neither slice is empty.  None is always right, but costs time: of a block for which it is
        always returned, thousands of small parts are evaluated one by one.
        """

    def reach(self, rows: slice) -> slice:  # noqa: ARG002
        """Return a slice that includes all keys which some of these rows see."""
        return slice(0, 2**62)

    def edges(self, rows: slice) -> Sequence[int]:  # noqa: ARG002
        """Return the rows, first excluded, at which what is visible changes for good."""
        return ()

    def check(self, S_Q: int, S_KV: int) -> None:  # noqa: B027
        """Raise ValueError if the rule does not fit these numbers of queries and keys."""

    def __and__(self, other: "Rule") -> "Rule":
        """Return the rule that hides what either of two hides."""
        return Both(self, other) if isinstance(other, Rule) else NotImplemented


@dataclass(frozen=True)
class Both(Rule):
    """Hide what either of two rules hides; ``a & b``."""

    a: Rule
    b: Rule

    def __call__(self, b: Array, h: Array, q_index: Array, kv_index: Array) -> Array:
        """Return whether queries see keys."""
        return self.a(b, h, q_index, kv_index) & self.b(b, h, q_index, kv_index)

    def sees(self, rows: slice, keys: slice) -> bool | None:
        """Return True if all of these rows see all of these keys, False if none does, else None."""
        verdicts = self.a.sees(rows, keys), self.b.sees(rows, keys)
        return False if False in verdicts else None if None in verdicts else True

    def reach(self, rows: slice) -> slice:
        """Return the keys within both rules' reach."""
        return _common(self.a.reach(rows), self.b.reach(rows))

    def edges(self, rows: slice) -> Sequence[int]:
        """Return both rules' edges."""
        return sorted({*self.a.edges(rows), *self.b.edges(rows)})

    def check(self, S_Q: int, S_KV: int) -> None:
        """Raise ValueError if either rule does not fit."""
        self.a.check(S_Q, S_KV)
        self.b.check(S_Q, S_KV)


def same_rule(a: Rule | None, b: Rule | None) -> bool:
    """Return whether two rules are equal.

    Raises
    ------
    TypeError
        They cannot be compared.
    """
    try:
        return bool(a == b)
    except Exception as error:  # a user's rule may raise anything
        raise TypeError(f"mask: expected a Rule that compares by ==, {_SUCH}: {error}") from None


def check_sendable(rule: Rule) -> None:
    """Raise TypeError if a rule that has been sent to another process would not be equal to it."""
    try:
        sent = pickle.loads(pickle.dumps(rule))
    except Exception as error:  # pickle raises many kinds
        raise TypeError(f"mask: expected a Rule that can be pickled, got {error!r}") from None
    if not same_rule(sent, rule):
        raise TypeError(f"mask: expected a Rule that compares by ==, {_SUCH}, got {rule!r:.100}")


def visible_parts(
    rule: Rule, rows: slice, keys: slice, *, every_edge: bool = False, smallest: int = 0
) -> Iterator[tuple[slice, slice, bool]]:
    """Yield the parts of a block that must be computed, in the order of their rows.

    A part is cut off where a document begins, or halved, until all of it is visible or it is small.

    Parameters
    ----------
    rule : Rule
    rows, keys : slice
        Of global indices, with start and stop.
    every_edge : bool
        Whether to cut small parts, too, where a document begins.
    smallest : int
        A part of at most ``smallest ** 2`` scores is not cut further.  Default: `SMALLEST`, or more
        for a block that would have thousands of such parts.

    Yields
    ------
    rows, keys : slice
    whole : bool
        Whether all of the part is visible.

    Examples
    --------
    >>> from lvxattn.reference import Segments
    >>> list(visible_parts(Segments((4, 600), (3, 500)), slice(0, 604), slice(0, 503)))
    [(slice(0, 4, None), slice(0, 3, None), True), (slice(4, 604, None), slice(3, 503, None), True)]
    """
    if rows.start >= rows.stop:
        return
    keys = _common(keys, rule.reach(rows))
    if keys.start >= keys.stop:
        return
    verdict = rule.sees(rows, keys)
    if verdict is False:
        return
    s_q, s_kv = rows.stop - rows.start, keys.stop - keys.start
    smallest = smallest or max(SMALLEST, isqrt(s_q * s_kv) // 64)
    edges = rule.edges(rows)
    if verdict or (s_q * s_kv <= smallest**2 and not (every_edge and edges)):
        yield rows, keys, verdict is True
        return
    if edges or s_q >= s_kv:
        middle = edges[len(edges) // 2] if edges else rows.start + s_q // 2
        halves = (slice(rows.start, middle), keys), (slice(middle, rows.stop), keys)
    else:
        middle = keys.start + s_kv // 2
        halves = (rows, slice(keys.start, middle)), (rows, slice(middle, keys.stop))
    for half in halves:
        yield from visible_parts(rule, *half, every_edge=every_edge, smallest=smallest)


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))
