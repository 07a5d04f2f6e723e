"""What a rank has to keep: features, keys and values, text, and what travels.

A model's cross-attention layers all read the same visual features.  Kept for the backward, keys and
values are a layer's own, and there are many; made again from the features, those of one layer are
there at a time (arXiv:2502.02406, section 4).
"""

from dataclasses import dataclass

from lvxattn.reference.plan.problems import Model
from lvxattn.reference.wire import ITEMSIZE


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, of all cross-attention layers together.

    Attributes
    ----------
    features : int
        Visual features, which all layers share.
    keys : int
        Keys and values: of all layers, or of one where they are made again.
    text : int
        q, out and lse of all layers.
    blocks : int
        Queries and results under way, with lv-xattn: two buffers of each.
    """

    features: int
    keys: int
    text: int
    blocks: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.features + self.keys + self.text + self.blocks


def memory(
    model: Model, text_tokens: int, frames: int, P: int, *, dtype: str, recompute: bool
) -> Memory:
    """Return what training takes of a rank for cross-attention.

    Parameters
    ----------
    model : Model
    text_tokens, frames : int
        Of the whole problem; each rank has its share, rounded up.
    P : int
    dtype : str
    recompute : bool
        Whether keys and values are made again in the backward.

    Returns
    -------
    Memory
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
    model: Model, text_tokens: int, P: int, room: float, *, dtype: str, recompute: bool
) -> int:
    """Return how many frames fit into a rank's memory, if cross-attention has all of it.

    Parameters
    ----------
    model, text_tokens, P, dtype, recompute
        As given to `memory`.
    room : float
        Bytes of a rank.

    Returns
    -------
    int
    """
    least, most = 0, 1
    while _fits(model, text_tokens, most, P, room, dtype, recompute):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        if _fits(model, text_tokens, middle, P, room, dtype, recompute):
            least = middle
        else:
            most = middle
    return least


def _fits(
    model: Model, text_tokens: int, frames: int, P: int, room: float, dtype: str, recompute: bool
) -> bool:
    taken = memory(model, text_tokens, frames, P, dtype=dtype, recompute=recompute)
    return taken.total <= room
