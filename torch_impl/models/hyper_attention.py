"""Hyper attention: attention of a text to itself and, with the same queries, to images.

With visual features y, the text's features x, and the layer's norm, which both share,

    q, k, v    = rotary(heads(W norm(x)))
    k_v, v_v   = rotary(heads(W_v norm(y)))       of v_v nothing is rotated, as of v
    own, lse   = attention(q, k, v)               causal, over the text
    seen, lse_v = attention(q, k_v, v_v)          over the images that the token sees

    fused:  out = merge(own, lse, seen, lse_v)    one softmax over text and images
    gated:  out = own (1 - g) + seen g            g = sigmoid(W_g own + b), head by head

All keys of an image have one position, that of the image in the text.  A token that sees no image
has out = own.

Source: arXiv:2408.04840; `owl3` says what was read, and what is certain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2Model,
    apply_rotary_pos_emb,
    rotate_half,
)

from lvxattn.common.masks import MaskRule
from lvxattn.torch_impl.cross_attention import cross_attention
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.merge import merge
from lvxattn.torch_impl.models.spread import Make

# How this version of transformers names the argument for a cache.
CACHE = "cache" if "cache" in signature(Qwen2Model.forward).parameters else "past_key_values"


class Attend(Protocol):
    """Attention from the text to the keys of images."""

    def __call__(
        self, make: Make, q: Tensor, y: Tensor, table: Tensor, *, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        """Return out (B, s_q, H, D_V) and lse (B, H, s_q).

        Parameters
        ----------
        make : callable
            ``make(q, y) -> (q, k, v, scale)``
        q : (B, H, s_q, D)
        y : Tensor
        table : (B, s_q, images), bool
            Which token sees which image.
        recompute : bool
            Whether k and v may be made again in the backward.
        """


@dataclass(frozen=True)
class Visual:
    """The images of a forward.

    Attributes
    ----------
    features : (B, images, keys, E), optional
        Of the images that are given; None where `kept` has their keys and values.
    rotation : (Tensor, Tensor)
        cos and sin (B, 1, images, 1, D) of the positions of the images that are given.
    table : (B, s_q, images), bool
        Which token sees which of all images.
    attend : Attend
    kept : dict, optional
        Keys and values by layer, where there is a cache.
    """

    features: Tensor | None
    rotation: tuple[Tensor, ...]
    table: Tensor
    attend: Attend
    kept: dict[int, tuple[Tensor, Tensor]] | None


class HyperLayer(Qwen2DecoderLayer):  # type: ignore[no-untyped-call]
    """A decoder layer of Qwen2 with hyper attention.

    Its forward takes `visual`, a `Visual` or None, beside the arguments of Qwen2's.
    """

    def __init__(self, config: Qwen2Config, layer_idx: int, fused: bool) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = HyperAttention(config, layer_idx, fused)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer; its norm is that of visual features, too."""
        return super().forward(*args, norm=self.input_layernorm, **kwargs)


class HyperAttention(Qwen2Attention):
    """Attention of a text to itself and to images."""

    def __init__(self, config: Qwen2Config, layer_idx: int, fused: bool) -> None:
        super().__init__(config, layer_idx)
        kv_heads: Any = config.num_key_value_heads
        self.v_kv_proj = nn.Linear(config.hidden_size, 2 * kv_heads * self.head_dim)
        # Set where the text is sharded.
        self.attend_to_text: Callable[..., tuple[Tensor, Tensor]] = attend_to_text
        self.gate_proj = None
        if not fused:
            self.gate_proj = nn.Sequential(nn.Linear(self.head_dim, self.head_dim), nn.Sigmoid())

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        *,
        norm: Callable[[Tensor], Tensor],
        visual: Visual | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute hyper attention; without images, self-attention."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (
            w(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in projections
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        cache = kwargs.get(CACHE)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out, lse = self.attend_to_text(q, k, v, self.scaling, attention_mask)
        if visual is not None:
            seen, lse_seen = self._attend_to_images(q, norm, visual)
            out = self._join(out, lse, seen, lse_seen, visual.table)
        return self.o_proj(out.flatten(2)), None

    def make_kv(self, y: Tensor, rotation: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H_KV, images x keys, D) of visual features after the norm.

        Raises
        ------
        ValueError
            There are positions of another number of images.
        """
        cos, sin = rotation
        if y.shape[1] != cos.shape[2]:
            raise ValueError(
                f"pixel_values: expected {cos.shape[2]} images, for which there are positions, "
                f"got {y.shape[1]}"
            )
        both = self.v_kv_proj(y).unflatten(-1, (-1, 2, self.head_dim))  # k and v of each head
        k, v = both.permute(4, 0, 3, 1, 2, 5)  # (B, H_KV, images, keys, D)
        k = k * cos + rotate_half(k) * sin  # type: ignore[no-untyped-call]
        return k.flatten(2, 3), v.flatten(2, 3)

    def _attend_to_images(
        self, q: Tensor, norm: Callable[[Tensor], Tensor], visual: Visual
    ) -> tuple[Tensor, Tensor]:
        y, kept, scale = visual.features, visual.kept, self.scaling

        def make(q: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
            return q, *self.make_kv(norm(y), visual.rotation), scale

        if kept is None:
            assert y is not None
            return visual.attend(make, q, y, visual.table, recompute=True)
        if y is not None:
            kept[self.layer_idx] = make(q, y)[1:3]
        k, v = kept[self.layer_idx]
        return visual.attend(lambda q, k: (q, k, v, scale), q, k, visual.table, recompute=False)

    def _join(
        self, own: Tensor, lse: Tensor, seen: Tensor, lse_seen: Tensor, table: Tensor
    ) -> Tensor:
        """Return attention to text and images (B, s_q, H, D) from that to either."""
        if self.gate_proj is None:
            own, seen = own.transpose(1, 2), seen.transpose(1, 2)  # (B, H, s_q, D)
            out, _ = merge(own, lse, seen, lse_seen)
            return out.transpose(1, 2).to(own.dtype)
        gate = self.gate_proj(own)
        sees_any = table.any(-1)[..., None, None]
        return torch.where(sees_any, own * (1 - gate) + seen * gate, own)


def attend_to_text(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend to the text, with the mask that transformers makes for SDPA; as `attend_alone`."""
    return attend_alone(q, k, v, scale, self_attention_mask(mask, q.shape[2]))


def self_attention_mask(mask: Tensor | None, s_q: int) -> Tensor | MaskRule | None:
    """Return the mask of self-attention from that which transformers makes for SDPA.

    Raises
    ------
    ValueError
        It is another implementation's.
    """
    if mask is None:  # SDPA would be told by a flag
        return causal if s_q > 1 else None
    if getattr(mask, "ndim", None) != 4:
        raise ValueError(
            "attn_implementation: expected sdpa, whose masks are (B, 1, s_q, S), got a mask of "
            f"{tuple(mask.shape)}"
        )
    return mask


def causal(_b: Tensor, _h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
    """Return whether a key comes not after the query; a mask."""
    return q_index >= kv_index


def attend_to_images(
    make: Make, q: Tensor, y: Tensor, table: Tensor, *, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Attend to images that are all in this process; an `Attend`.  k and v are saved."""
    del recompute
    q, k, v, scale = make(q, y)
    keys = k.shape[2] // table.shape[2]

    def sees(b: Tensor, _: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return table[b, q_index, kv_index // keys]

    return attend_alone(q, k, v, scale, sees)


def attend_alone(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | MaskRule | None
) -> tuple[Tensor, Tensor]:
    """Return out (B, s_q, H, D_V) and lse (B, H, s_q) over keys in this process."""
    out, lse = cross_attention(q, k, v, Group(None), scale=scale, mask=mask, return_lse=True)
    return out.transpose(1, 2), lse


def position_of(image_positions: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return the positions (B, images) of images at these indices of a text."""
    index = image_positions.clamp(min=0)
    if position_ids is None:
        return index
    return position_ids.expand(len(index), -1).gather(1, index)  # which do not count padding
