"""Compute what a rank keeps in memory: features, keys and values, text, and messages.

All cross-attention layers of a model read the same visual features.  Keys and values that are kept
for the backward are each layer's own; recomputed from the features, only those of one layer exist
at a time (arXiv:2502.02406, section 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lvxattn.common.exchange_base import RotationBase
from lvxattn.common.layout import Layout
from lvxattn.common.wire import (
    ITEMSIZE,
    KEY_GRADIENTS,
    KEYS_VALUES,
    PARTIALS,
    QUERIES,
    QUERY_BLOCKS,
    QUERY_GRADIENTS,
    Kind,
)

if TYPE_CHECKING:
    from lvxattn.plan.models import Model  # which imports this


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank for all cross-attention layers.

    Attributes
    ----------
    features : int
        Visual features, shared by all layers.
    keys : int
        Keys and values: of all layers, or of one where they are recomputed.
    text : int
        q, out and lse of all layers.
    blocks : int
        Buffers of queries and results with lv-xattn, two of each; a grid keeps those of a column.
    """

    features: int
    keys: int
    text: int
    blocks: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.features + self.keys + self.text + self.blocks


def memory(
    model: "Model", text_tokens: int, frames: int, P: int, *, dtype: str, recompute: bool
) -> Memory:
    """Return what cross-attention takes of a rank's memory in training.

    Parameters
    ----------
    model : Model
    text_tokens, frames : int
        Of the whole problem; each rank has its share, rounded up.
    P : int
        Number of ranks.
    dtype : str
    recompute : bool
        Whether the backward recomputes keys and values.

    Returns
    -------
    Memory

    Examples
    --------
    The paper's example, on one rank:

    >>> from lvxattn.plan import MODELS
    >>> found = memory(MODELS["llama3v"], 2048, 1200, 1, dtype="bfloat16", recompute=False)
    >>> round(found.keys / 2**30)
    235
    """
    narrow = ITEMSIZE[dtype]
    wide = ITEMSIZE["float64" if dtype == "float64" else "float32"]
    s_q, s_kv = -(-text_tokens // P), -(-frames * model.tokens_per_frame // P)
    layer = 2 * model.kv_heads * s_kv * model.head_dim * narrow
    row = model.heads * model.head_dim * narrow  # of q; out is as large
    result = model.heads * (model.head_dim + 1) * wide
    return Memory(
        features=s_kv * model.hidden * narrow,
        keys=layer * (1 if recompute else model.cross_layers),
        text=model.cross_layers * s_q * (2 * row + model.heads * wide),
        blocks=2 * s_q * (2 * row + 2 * model.heads * wide + result) if P > 1 else 0,
    )


def most_frames(
    model: "Model", text_tokens: int, P: int, room: float, *, dtype: str, recompute: bool
) -> int:
    """Return the largest number of frames for which `memory` fits into a rank.

    Parameters
    ----------
    model, text_tokens, P, dtype, recompute
        As given to `memory`.
    room : float
        Bytes of a rank.

    Returns
    -------
    int

    Examples
    --------
    >>> from lvxattn.plan import MODELS
    >>> given = {"dtype": "bfloat16", "recompute": True}
    >>> most_frames(MODELS["llama3v"], 2048, 16, room=80e9, **given)
    16260
    """
    given: dict[str, Any] = {"dtype": dtype, "recompute": recompute}
    return largest(lambda n: memory(model, text_tokens, n, P, **given).total <= room)


def call_memory(layout: Layout, *, backward: bool = False) -> list[int]:
    """Return how many bytes a pass allocates at least: results, and blocks of other ranks.

    Parameters
    ----------
    layout : Layout
    backward : bool

    Returns
    -------
    list of int
        By rank.  Lower bounds: tiles, and copies that an implementation makes, are not counted.

    Examples
    --------
    >>> from lvxattn.plan import planned
    >>> layout = planned((1, 8, 64, 64), (1, 8, 65536, 64), P=4, dtype="float32")
    >>> call_memory(layout)[0], call_memory(layout, backward=True)[0]
    (166400, 67340288)
    """
    owners, narrow = range(layout.size), layout.dtype != layout.accumulator

    def sizes(kind: Kind) -> list[int]:
        return [kind.nbytes(layout, owner) for owner in owners]

    there, back = (QUERY_BLOCKS, QUERY_GRADIENTS) if backward else (QUERIES, PARTIALS)
    # Without masks, which may be the same for all heads.
    keys = [sum(f.nbytes for f in KEYS_VALUES.fields(layout, owner)[:2]) for owner in owners]
    queries, results, dkvs = map(sizes, (there, back, KEY_GRADIENTS))
    if backward:  # dq, dk and dv are as large as q, k and v
        sums = dkvs if narrow and layout.way != "ring" else [0] * layout.size
        dq, dkv = ("q" in layout.gradients, "k" in layout.gradients)
        mine = [q * dq + k * dkv + s for q, k, s in zip(sizes(QUERIES), keys, sums, strict=True)]
    else:
        row = layout.D_V * ITEMSIZE[layout.dtype] + ITEMSIZE[layout.accumulator]
        mine = [layout.B * layout.H * s_q * row for s_q in layout.s_q]
    if layout.size == 1 or layout.way != layout.schedule:
        return mine
    if layout.way == "gather":
        return [n + sum(queries) + sum(results) for n in mine]
    if layout.way == "ulysses":
        return [n + (sum(queries) + sum(keys) + sum(results)) // layout.size for n in mine]
    moving = [(there, queries), (back, results)] if layout.shape[0] > 1 else []
    if layout.shape[1] > 1:
        moving += [(KEYS_VALUES, keys), (KEY_GRADIENTS, dkvs)][: 1 + backward]
    return [
        n + sum(_others(layout.seen_by(rank), kind, of) for kind, of in moving)
        for rank, n in enumerate(mine)
    ]


def _others(layout: Layout, kind: Kind, sizes: list[int]) -> int:
    """Return how many bytes of other ranks' blocks this rank has at one time, at least."""
    if layout.structures:  # not all come
        rotation = RotationBase(layout, kind)
        return max(map(rotation.nbytes, rotation.comes.values()), default=0)
    ring = layout.ring(kind.side)
    at = ring.index(layout.rank)
    others = [sizes[owner] for owner in (*ring[at + 1 :], *ring[:at])]
    if kind.side == "queries" and layout.shape[1] > 1:
        return sum(others)  # kept, to meet all keys
    # One, and the next, which comes meanwhile.
    return max(map(sum, pairwise(others)), default=others[0])


def largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, or 0; a number fits if a larger one does."""
    least, most = 0, 1
    while fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
