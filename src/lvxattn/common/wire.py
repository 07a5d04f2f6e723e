"""Kinds of blocks: their names and tags, and the shapes and dtypes in which they are sent.

Blocks that go round the ring, and the results that follow one hop behind:

    QUERIES       q                     PARTIALS         out, top, total
    QUERY_BLOCKS  q, dout, lse, delta   QUERY_GRADIENTS  dq
    KEYS_VALUES   k, v, array mask      KEY_GRADIENTS    dk, dv
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from lvxattn.common.layout import Layout

# One tag for each of the two rotations that run at once.
BLOCKS, RESULTS = 7001, 7002
ITEMSIZE = {"bool": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Field(NamedTuple):
    """One array of a block."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Kind:
    """A kind of block that goes round the ring.

    Attributes
    ----------
    name : str
        With ``{}`` for the owner.
    tag : int
    fields : callable
        ``fields(layout, owner)`` returns the arrays of the block of rank `owner`.
    """

    name: str
    tag: int
    fields: Callable[[Layout, int], list[Field]]

    def nbytes(self, layout: Layout, owner: int) -> int:
        """Return the size of a rank's block in bytes."""
        return sum(field.nbytes for field in self.fields(layout, owner))


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
    return [Field((layout.B, layout.H, layout.s_q[owner], layout.D), layout.accumulator)]


def _keys_values(layout: Layout, owner: int) -> list[Field]:
    rows, mask = (layout.B, layout.H_KV, layout.s_kv[owner]), layout.masks[owner]
    fields = [Field((*rows, width), layout.dtype) for width in (layout.D, layout.D_V)]
    return fields if mask is None else [*fields, Field(*mask)]


def _key_gradients(layout: Layout, owner: int) -> list[Field]:
    rows = layout.B, layout.H_KV, layout.s_kv[owner]
    return [Field((*rows, width), layout.accumulator) for width in (layout.D, layout.D_V)]


QUERIES = Kind("the queries of rank {}", BLOCKS, _queries)
PARTIALS = Kind("the results for rank {}'s queries", RESULTS, _partials)
QUERY_BLOCKS = Kind(QUERIES.name, BLOCKS, _query_blocks)
QUERY_GRADIENTS = Kind(PARTIALS.name, RESULTS, _query_gradients)
KEYS_VALUES = Kind("the keys and values of rank {}", BLOCKS, _keys_values)
KEY_GRADIENTS = Kind("the gradients of rank {}'s keys and values", RESULTS, _key_gradients)

# By schedule, the names of the blocks that go round and of the results that follow.
NAMES = {
    "lv-xattn": (QUERIES.name, PARTIALS.name),
    "ring": (KEYS_VALUES.name, KEY_GRADIENTS.name),
}
