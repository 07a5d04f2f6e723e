"""Kinds of blocks: their names, their tags, and the shapes and dtypes of their arrays.

What travels round the ring, and what follows it one hop behind:

    QUERIES       q                     PARTIALS         out, top, total
    QUERY_BLOCKS  q, dout, lse, delta   QUERY_GRADIENTS  dq
    KEYS_VALUES   k, v, array mask      KEY_GRADIENTS    dk, dv
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, prod
from typing import Any, NamedTuple

from lvxattn.common.layout import Layout
from lvxattn.common.validation import dtype_name

Array = Any

# Tags of blocks and of results, which travel between the same two ranks at once.
BLOCKS, RESULTS = 7001, 7002
ITEMSIZE = {"bool": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Field(NamedTuple):
    """One array of a block."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """The size of the array in bytes."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @staticmethod
    def like(x: Array, *, heads: int | None = None, rows: int | None = None) -> "Field":
        """Return the field of an array as x (B, H, s, ...), with other numbers of heads or rows."""
        B, H, s, *rest = x.shape
        heads, rows = H if heads is None else heads, s if rows is None else rows
        return Field((B, heads, rows, *rest), dtype_name(x))


# The arrays of a block, by its owner's rank.
Fields = Callable[[int], list[Field]]


def nbytes(fields: list[Field]) -> int:
    """Return the size of a block in bytes."""
    return sum(field.nbytes for field in fields)


def cut(buffer: Array, fields: list[Field], dtype_of: Callable[[str], Any]) -> list[Array]:
    """Return the arrays of a block that lies in a buffer of bytes, as views.

    Parameters
    ----------
    buffer : (n,) of uint8
        Of any library.
    fields : list of Field
    dtype_of : callable
        Returns the library's dtype of a name.
    """
    views: dict[int, Array] = {}
    start = 0
    # Wide dtypes first, so that every array is aligned without gaps.
    for i in sorted(range(len(fields)), key=lambda i: -ITEMSIZE[fields[i].dtype]):
        stop = start + fields[i].nbytes
        views[i] = buffer[start:stop].view(dtype_of(fields[i].dtype)).reshape(fields[i].shape)
        start = stop
    return [views[i] for i in range(len(fields))]


def mask_fields(layout: Layout, owner: int, parts: int) -> list[Field]:
    """Return the field of a rank's array mask, cut in `parts` by heads; [] if it has none."""
    if (kind := layout.masks[owner]) is None:
        return []
    shape, dtype = kind
    B, H, rows, columns = (1,) * (4 - len(shape)) + shape
    return [Field((B, max(1, H // parts), rows, columns), dtype)]


@dataclass(frozen=True)
class Kind:
    """A kind of block that travels round the ring.

    Attributes
    ----------
    name : str
        With "{}" for the owner's rank.
    tag : int
    side : str
        Of ``"queries"`` or of ``"keys"``: round which ring it moves.
    fields : callable
        ``fields(layout, owner)`` returns the arrays of the block of rank `owner`; [] if nobody
        wants them, and then nothing travels.
    fill : tuple of float
        By array, the value of rows that are not sent.
    """

    name: str
    tag: int
    side: str
    fields: Callable[[Layout, int], list[Field]]
    fill: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def nbytes(self, layout: Layout, owner: int) -> int:
        """Return the size of a rank's block."""
        return nbytes(self.fields(layout, owner))


def _queries(layout: Layout, owner: int) -> list[Field]:
    return [Field((layout.B, layout.H, layout.s_q[owner], layout.D), layout.dtype)]


def _partials(layout: Layout, owner: int) -> list[Field]:
    rows, wide = (layout.B, layout.H, layout.s_q[owner]), layout.accumulator
    return [Field((*rows, layout.D_V), wide), Field(rows, wide), Field(rows, wide)]


def _query_blocks(layout: Layout, owner: int) -> list[Field]:
    rows, wide = (layout.B, layout.H, layout.s_q[owner]), layout.accumulator
    dout = Field((*rows, layout.D_V), layout.dtype)
    return [*_queries(layout, owner), dout, Field(rows, wide), Field(rows, wide)]


def _query_gradients(layout: Layout, owner: int) -> list[Field]:
    if "q" not in layout.gradients:
        return []
    return [Field((layout.B, layout.H, layout.s_q[owner], layout.D), layout.accumulator)]


def _keys_values(layout: Layout, owner: int) -> list[Field]:
    rows, mask = (layout.B, layout.H_KV, layout.s_kv[owner]), layout.masks[owner]
    fields = [Field((*rows, width), layout.dtype) for width in (layout.D, layout.D_V)]
    return fields if mask is None else [*fields, Field(*mask)]


def _key_gradients(layout: Layout, owner: int) -> list[Field]:
    if "k" not in layout.gradients:
        return []
    rows = layout.B, layout.H_KV, layout.s_kv[owner]
    return [Field((*rows, width), layout.accumulator) for width in (layout.D, layout.D_V)]


QUERIES = Kind("the queries of rank {}", BLOCKS, "queries", _queries)
PARTIALS = Kind(
    "the results for rank {}'s queries", RESULTS, "queries", _partials, fill=(0.0, -inf, 0.0)
)
QUERY_BLOCKS = Kind(QUERIES.name, BLOCKS, "queries", _query_blocks)
QUERY_GRADIENTS = Kind(PARTIALS.name, RESULTS, "queries", _query_gradients)
KEYS_VALUES = Kind("the keys and values of rank {}", BLOCKS, "keys", _keys_values)
KEY_GRADIENTS = Kind("the gradients of rank {}'s keys and values", RESULTS, "keys", _key_gradients)

# What travels round the ring, by schedule, and what follows it.
NAMES = {
    "lv-xattn": (QUERIES.name, PARTIALS.name),
    "ring": (KEYS_VALUES.name, KEY_GRADIENTS.name),
    "grid": (QUERIES.name, PARTIALS.name),  # and the ring's
}
