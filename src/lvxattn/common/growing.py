"""The layout for other numbers of queries, as text grows: `Layout.with_queries`."""

from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

from lvxattn.common.handshake import MASKS_TRAVEL
from lvxattn.common.rules import Rule, check_sendable
from lvxattn.common.validation import Communicator, on_rank, raise_lowest

if TYPE_CHECKING:
    from lvxattn.common.layout import Layout  # which imports this

L = TypeVar("L", bound="Layout")


def for_queries(layout: L, s_q: Any, rule: Any) -> L | Exception:
    """Return the layout of this rank's arguments, or what is wrong with them.  Not collective."""
    try:
        return _for_queries(layout, s_q, rule)
    except (TypeError, ValueError) as error:
        return error


def _for_queries(layout: L, s_q: Any, rule: Any) -> L:
    lengths = _lengths(s_q, layout.size, layout.queries)
    S_Q = lengths[0] if layout.queries == "replicated" else sum(lengths)
    changes: dict[str, Any] = {}
    if rule is not None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: expected a Rule or None, got {type(rule).__name__}")
        check_sendable(rule)
        changes = {"structures": (rule,) * layout.size, "rules": (True,) * layout.size}
        changes["masks"] = (None,) * layout.size
    found = replace(layout, s_q=lengths, **changes)
    for structure in found.structures:
        if structure is not None:
            structure.check(S_Q, layout.S_KV)
    rows = [kind[0][-2] for kind in found.masks if kind and len(kind[0]) > 1]
    if found.way in MASKS_TRAVEL and any(n != 1 for n in rows):
        raise ValueError(
            f"layout: expected array masks of one row for all queries with {found.way!r}, "
            f"which sends them, got {max(rows)} rows; agree on a layout for the next mask"
        )
    return found


def _lengths(s_q: Any, size: int, queries: str) -> tuple[int, ...]:
    """Return the numbers of queries by rank."""
    whole = queries == "replicated"
    try:
        given = (s_q,) * size if whole else tuple(s_q)
        if True in [isinstance(n, bool) for n in given]:
            raise TypeError
        lengths = tuple(map(index, given))
    except TypeError:
        lengths = ()
    if len(lengths) != size or min(lengths) < 0:
        expected = "a number of queries" if whole else f"{size} numbers of queries, by rank"
        raise ValueError(f"s_q: expected {expected}, got {s_q!r:.100}")
    return lengths


def compared(found: L | Exception, comm: Communicator) -> L:
    """Return this rank's layout, or raise, on all ranks, if one has an error or another layout.

    Collective: every rank of comm calls this.
    """
    mine: Any = found if isinstance(found, Exception) else (found.s_q, found.structures)
    gathered = comm.allgather(mine)
    raise_lowest([x if isinstance(x, Exception) else None for x in gathered])
    for rank, given in enumerate(gathered):
        for name, expected, got in zip(("s_q", "rule"), gathered[0], given, strict=True):
            if got != expected:
                text = f"{name}: expected rank 0's {expected!r:.99}, got {got!r:.99}"
                raise on_rank(ValueError(text), rank, comm.size)
    assert not isinstance(found, Exception)
    return found
