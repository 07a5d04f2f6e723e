"""mPLUG-Owl3: a Qwen2 whose hyper attention lets some layers attend to text and to images.

Visual features y are keys and values only, and pass through no layer.  In the layers named by
`Owl3Config.hyper_layers` the text's queries q, the same for both, attend to the text and to images:

    k_v, v_v = rotary(heads(W norm(y)))           norm: the layer's own, of the text
    own, lse = attention(q, k, v)                 causal, over the text
    seen, lse_v = attention(q, k_v, v_v)          over the images before the token

    fused (241101):  out = merge(own, lse, seen, lse_v): one softmax over text and images
    gated (240728):  out = own (1 - g) + seen g,  g = sigmoid(W_g own), head by head

A token before the first image keeps `own`.  All keys of an image are rotated to one position, that
of its token in the text.

Source: arXiv:2408.04840.  Written anew after the description there and after two public copies of
its code, of the torch version 240728 and of a port of 241101 to Paddle; no published weights were
loaded.  Both copies agree on the shared norm and queries, on `W` with k and v interleaved by head,
on features of the tower's last layer but one, and on hyper_layers.  By them, 240728 projects
features by one matrix, 241101 by two and a GELU; in 241101 an image's token sees the image and
keys have that token's position, in 240728 the next token is the first that sees it, and keys have
the position of that one.  Not certain: the gate, which another port of 240728 has as one learned
vector; and padding, which 241101's copy ignores in these layers, while here it is never seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2Model,
    apply_rotary_pos_emb,
    rotate_half,
)

from lvxattn.torch_impl.cross_attention import cross_attention
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.merge import merge
from lvxattn.torch_impl.models.spread import Make

# How this version of transformers names the argument for a cache.
CACHE = "cache" if "cache" in signature(Qwen2Model.forward).parameters else "past_key_values"


class Owl3Config(PretrainedConfig):
    """The configuration of an `Owl3`.

    Parameters
    ----------
    text_config : Qwen2Config or dict, optional
        Its attention_dropout must be 0.
    vision_config : SiglipVisionConfig or dict, optional
    hyper_layers : sequence of int
        The layers with hyper attention, counted from 1, as in the published configuration.
    fused : bool
        Whether one softmax is over text and images, as in version 241101, or a gate mixes the
        results of two, as in version 240728.
    image_token_id : int
        The token that stands for an image in the text.
    """

    model_type = "lvxattn_owl3"
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        hyper_layers: Any = (1, 9, 17, 25),
        fused: bool = True,
        image_token_id: int = 151646,
        **kwargs: Any,
    ) -> None:
        self.text_config = _config(text_config, Qwen2Config)
        self.vision_config = _config(vision_config, SiglipVisionConfig)
        self.hyper_layers, self.fused = list(hyper_layers), fused
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


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
    """What hyper attention has to know of the images.

    Attributes
    ----------
    features : (B, images x keys, E), optional
        Of the given images; None where their keys and values are kept.
    cos, sin : (B, 1, images, 1, D), optional
        Of the positions of the given images.
    table : (B, s_q, images), bool
        Which token sees which of all images.
    attend : Attend
    kept : dict, optional
        By layer, keys and values, where there is a cache.
    norm : callable, optional
        The layer's.
    """

    features: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    table: Tensor
    attend: Attend
    kept: dict[int, tuple[Tensor, Tensor]] | None
    norm: Callable[[Tensor], Tensor] | None = None


class HyperAttention(Qwen2Attention):
    """Attention of a text to itself and to images."""

    def __init__(self, config: Qwen2Config, layer_idx: int, fused: bool) -> None:
        super().__init__(config, layer_idx)
        width = config.num_key_value_heads * self.head_dim
        self.v_kv_proj = nn.Linear(config.hidden_size, 2 * width)
        self.gate_proj = None if fused else nn.Linear(self.head_dim, self.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        visual: Visual | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute hyper attention; without images, self-attention."""
        x = hidden_states
        q, k, v = (self._heads(w(x)) for w in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        cache = kwargs.get(CACHE)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if attention_mask is None and q.shape[2] > 1:  # what SDPA would be told by a flag
            mask: Any = lambda _b, _h, q_index, kv_index: q_index >= kv_index  # noqa: E731
        else:
            mask = attention_mask
        out, lse = attend_alone(q, k, v, self.scaling, mask)
        if visual is not None:
            out = self._with_images(q, out, lse, visual)
        return self.o_proj(out.flatten(2)), None

    def make_kv(self, y: Tensor, visual: Visual) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H_KV, images x keys, D) of visual features."""
        assert visual.norm is not None
        assert visual.cos is not None
        assert visual.sin is not None
        # k and v of a head are neighbours: (B, images x keys, H_KV, 2, D)
        both = self.v_kv_proj(visual.norm(y)).unflatten(-1, (-1, 2, self.head_dim))
        k, v = both.permute(3, 0, 2, 1, 4)
        k = k.unflatten(2, (visual.cos.shape[2], -1))  # (B, H_KV, images, keys, D)
        return (k * visual.cos + rotate_half(k) * visual.sin).flatten(2, 3), v

    def _with_images(self, q: Tensor, own: Tensor, lse: Tensor, visual: Visual) -> Tensor:
        kept = visual.kept
        if kept is None:
            assert visual.features is not None
            seen, lse_seen = visual.attend(
                lambda q, y: (q, *self.make_kv(y, visual), self.scaling),
                q, visual.features, visual.table, recompute=True,
            )  # fmt: skip
        else:
            if visual.features is not None:
                kept[self.layer_idx] = self.make_kv(visual.features, visual)
            k, v = kept[self.layer_idx]
            seen, lse_seen = visual.attend(
                lambda q, k: (q, k, v, self.scaling), q, k, visual.table, recompute=False
            )
        if self.gate_proj is None:
            own, seen = own.transpose(1, 2), seen.transpose(1, 2)  # (B, H, s_q, D)
            out, _ = merge(own, lse, seen, lse_seen)
            return out.transpose(1, 2).to(q.dtype)
        gate = self.gate_proj(own).sigmoid()  # (B, s_q, H, D)
        after_image = visual.table.any(-1)[..., None, None]
        return torch.where(after_image, own * (1 - gate) + seen * gate, own)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class HyperLayer(Qwen2DecoderLayer):
    """A decoder layer of Qwen2 with hyper attention."""

    def __init__(self, config: Qwen2Config, layer_idx: int, fused: bool) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = HyperAttention(config, layer_idx, fused)

    def forward(self, *args: Any, visual: Visual | None = None, **kwargs: Any) -> Any:
        """Compute the layer, whose norm is the images', too."""
        if visual is not None:
            visual = replace(visual, norm=self.input_layernorm)
        return super().forward(*args, visual=visual, **kwargs)


class Owl3(PreTrainedModel, GenerationMixin):
    """A Qwen2 with hyper attention to images, which a SigLIP tower encodes.

    Parameters
    ----------
    config : Owl3Config
    """

    config_class = Owl3Config
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("HyperLayer", "Qwen2DecoderLayer", "SiglipEncoderLayer")
    _supports_sdpa = True

    def __init__(self, config: Owl3Config) -> None:
        super().__init__(config)
        text, fused = config.text_config, config.fused
        if text.attention_dropout:
            raise ValueError(f"attention_dropout: expected 0, got {text.attention_dropout}")
        if not set(config.hyper_layers) <= set(range(1, 1 + text.num_hidden_layers)):
            raise ValueError(
                f"hyper_layers: expected layers from 1 to {text.num_hidden_layers}, "
                f"got {config.hyper_layers}"
            )
        self.language_model = Qwen2ForCausalLM(text)
        for n in config.hyper_layers:
            self.language_model.model.layers[n - 1] = HyperLayer(text, n - 1, fused)
        self.vision_model = SiglipVisionModel(config.vision_config)
        layers = [nn.Linear(config.vision_config.hidden_size, text.hidden_size)]
        if fused:
            layers += [nn.GELU(), nn.Linear(text.hidden_size, text.hidden_size)]
        self.vision2text_model = nn.Sequential(*layers)
        # Set where the model is spread: which of the text's images are given, and the attention.
        self.given = slice(None)
        self.attend: Attend = attend_to_images
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of tokens."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the projection to logits."""
        return self.language_model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_positions: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits, and the loss where there are labels.

        Parameters
        ----------
        input_ids : (B, S), int64
        attention_mask : (B, S), optional
            0 where the text is padding.
        position_ids : (B, S), int64, optional
        pixel_values : (B, images, 3, h, w), optional
            Given with the text that names the images, not again with a cache.
        image_positions : (B, images), int64, optional
            The index of each image's token in the text; -1 for an image that the row has not.
            Default: the first `image_token_id` is the first image's, and so on.
        labels : (B, S), int64, optional
        use_cache : bool, optional
            Whether to return a cache, which keeps the images' keys and values, too.

        Returns
        -------
        CausalLMOutputWithPast

        Raises
        ------
        ValueError
            Numbers of images that do not fit the text.
        """
        cache = kwargs.get(CACHE)
        past = 0 if cache is None else int(cache.get_seq_length())
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        positions, kept = getattr(cache, "visual", (None, None))
        features = cos = sin = None
        if pixel_values is not None:
            if kept is not None:
                raise ValueError("pixel_values: expected none with a cache that has images already")
            if image_positions is None:
                image_positions = self.find_images(input_ids, pixel_values.shape[1])
            positions, kept = image_positions, {} if use_cache else None
            features = self.encode(pixel_values)
            cos, sin = self._rotation(features, pixel_values.shape[1], positions, position_ids)
        visual = None
        if positions is not None:
            index = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
            last = index[:, None] - (0 if self.config.fused else 1)
            table = (positions >= 0)[:, None] & (positions[:, None] <= last)
            visual = Visual(features, cos, sin, table, self.attend, kept)
        outputs = self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            labels=labels, use_cache=use_cache, visual=visual, **kwargs,
        )  # fmt: skip
        if kept is not None:
            outputs[CACHE].visual = positions, kept
        return outputs

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, images x keys, E) of images (B, images, 3, h, w)."""
        pixels = pixel_values.flatten(0, 1)
        states = self.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        return self.vision2text_model(states).unflatten(0, pixel_values.shape[:2]).flatten(1, 2)

    def find_images(self, input_ids: Tensor, images: int) -> Tensor:
        """Return the index of each image's token (B, images) in the text, or -1.

        Raises
        ------
        ValueError
            There are more tokens than images.
        """
        is_image = input_ids == self.config.image_token_id
        most = int(is_image.sum(1).max())
        if most > images:
            raise ValueError(f"pixel_values: expected {most} images, as the text, got {images}")
        return _first(is_image, images)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate tokens; one that equals `image_token_id` stands for no image."""
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is not None and kwargs.get("image_positions") is None:
            ids = kwargs["input_ids"] if inputs is None else inputs
            kwargs["image_positions"] = self.find_images(ids, pixel_values.shape[1])
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the next forward of `generate`: images once, with a cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if hasattr(kwargs.get(CACHE), "visual"):
            inputs.pop("pixel_values", None)
        return inputs

    def _rotation(
        self, y: Tensor, images: int, positions: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        positions = positions[:, self.given]
        if positions.shape[1] != images:
            raise ValueError(
                f"pixel_values: expected {positions.shape[1]} images, as image_positions has, "
                f"got {images}"
            )
        positions = positions.clamp(min=0)
        if position_ids is not None:  # which do not count padding
            positions = position_ids.expand(len(positions), -1).gather(1, positions)
        if not self.config.fused:
            positions = positions + 1
        cos, sin = self.language_model.model.rotary_emb(y, positions)  # (B, images, D)
        return cos[:, None, :, None], sin[:, None, :, None]


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
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Any
) -> tuple[Tensor, Tensor]:
    """Return out (B, s_q, H, D_V) and lse (B, H, s_q) over keys in this process."""
    out, lse = cross_attention(q, k, v, Group(None), scale=scale, mask=mask, return_lse=True)
    return out.transpose(1, 2), lse


def _first(is_image: Tensor, images: int) -> Tensor:
    """Return the indices (B, images) of the first image tokens of each row, or -1."""
    B, S = is_image.shape
    count = is_image.cumsum(1)
    column = torch.where(is_image & (count <= images), count - 1, images)
    found = is_image.new_full((B, images + 1), -1, dtype=torch.long)
    index = torch.arange(S, device=is_image.device).expand(B, S)
    return found.scatter(1, column, index)[:, :images]


def _config(given: Any, kind: Any) -> Any:
    return kind(**(given or {})) if given is None or isinstance(given, dict) else given
