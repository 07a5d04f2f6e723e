"""mPLUG-Owl3: a Qwen2 some of whose layers have hyper attention to images.

Visual features are keys and values only, and pass through no layer (`hyper_attention`).  In
version 240728 they are projected by one matrix, and a token sees the images whose tokens come
before it, at the position after theirs.  In version 241101 they are projected by two matrices and
a GELU, and a token sees the same images and its own, at the position of theirs.

Source: arXiv:2408.04840, of which summaries were read, and public copies of both versions' code,
which was read but not copied; no published weights were loaded.  The copies agree on what the two
modules say, but for the gate of 240728: here it is a matrix of the head's result, as in the copy of
the original; a port to Paddle has one learned vector.  Keys that are padding are masked in all
layers; 241101's copy ignores the mask of padding in layers with hyper attention.  Not certain is
whether later revisions of the published code differ.
"""

from collections.abc import Callable
from typing import Any

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

from lvxattn.torch_impl.models.hyper_attention import (
    CACHE,
    Attend,
    HyperLayer,
    Visual,
    attend_to_images,
    position_of,
)


class Owl3Config(PretrainedConfig):  # type: ignore[no-untyped-call]
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
        The token that stands for an image in the text: the tokenizer's, which the default, the
        first after those of Qwen2, need not be.

    Examples
    --------
    >>> from lvxattn.torch_impl.models.owl3 import Owl3Config
    >>> config = Owl3Config({"num_hidden_layers": 8}, {"image_size": 384}, hyper_layers=(1, 5))
    >>> config.text_config.model_type, config.vision_config.image_size, config.fused
    ('qwen2', 384, True)
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


class Owl3(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A Qwen2 with hyper attention to images, which a SigLIP tower encodes.

    Parameters
    ----------
    config : Owl3Config

    Raises
    ------
    ValueError
        The configuration has layers that do not exist, or dropout.

    Examples
    --------
    A small one of random weights, whose token 31 stands for an image:

    >>> import torch
    >>> from lvxattn.torch_impl.models.owl3 import Owl3, Owl3Config
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    >>> text = {**sizes, "vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> vision = {**sizes, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    >>> model = Owl3(Owl3Config(text, vision, hyper_layers=(2,), image_token_id=31))
    >>> ids = torch.tensor([[5, 31, 6, 31, 7]])
    >>> outputs = model(ids, pixel_values=torch.ones(1, 2, 3, 8, 8), labels=ids)
    >>> outputs.loss.backward()
    >>> outputs.logits.shape
    torch.Size([1, 5, 32])
    """

    config_class = Owl3Config
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyperLayer", "Qwen2DecoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012
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
        self.language_model, width = Qwen2ForCausalLM(text), text.hidden_size
        for n in config.hyper_layers:
            self.language_model.model.layers[n - 1] = HyperLayer(text, n - 1, fused)
        self.vision_model = SiglipVisionModel(config.vision_config)
        self.vision2text_model: nn.Module = nn.Linear(config.vision_config.hidden_size, width)
        if fused:
            self.vision2text_model = nn.Sequential(
                self.vision2text_model, nn.GELU(), nn.Linear(width, width)
            )
        # Set where the model is spread: which of the text's images are given, and the attention.
        self.given: Callable[[int], slice] = lambda _: slice(None)
        self.attend: Attend = attend_to_images
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of tokens."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the projection to logits."""
        return self.language_model.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_positions: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        rows: tuple[int, int] | None = None,
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
        image_position_ids : (B, images), int64, optional
            The position of each image's token.  Default: that which `position_ids` have there.
        labels : (B, S), int64, optional
        use_cache : bool, optional
            Whether to return a cache, which keeps the images' keys and values, too.
        rows : (int, int), optional
            Which row of a sharded text is the first that is given, and how many it has.

        Returns
        -------
        CausalLMOutputWithPast

        Raises
        ------
        ValueError
            Images that do not fit the text, or are given beside a cache.
        """
        cache = kwargs.pop(CACHE, kwargs.pop("past_key_values", None))
        past = 0 if cache is None else int(cache.get_seq_length())
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        checkpointed = self.training and self.language_model.model.layers[0].gradient_checkpointing
        use_cache = use_cache and not checkpointed
        positions, kept = getattr(cache, "visual", (None, None)) if past else (None, None)
        features: Tensor | None = None
        rotation: tuple[Tensor, ...] = ()
        if pixel_values is not None:
            if past:
                raise ValueError(f"pixel_values: expected none with a cache of {past} tokens")
            positions = image_positions
            if positions is None:
                positions = self.find_images(input_ids, pixel_values.shape[1])
            self._check(positions, input_ids, input_ids.shape[1] if rows is None else rows[1])
            features, kept = self.encode(pixel_values), {} if use_cache else None
            if image_position_ids is None:
                image_position_ids = position_of(positions, position_ids)
            rotation = self._rotation(
                features, image_position_ids[:, self.given(positions.shape[1])]
            )
        visual = None
        if positions is not None:
            first = past if rows is None else rows[0]
            index = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            table = self.sees(index, positions)
            visual = Visual(features, rotation, table, self.attend, kept)
        outputs = self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            labels=labels, use_cache=use_cache, visual=visual, **{CACHE: cache}, **kwargs,
        )  # fmt: skip
        if visual is not None and use_cache:
            outputs[CACHE].visual = positions, kept
        return outputs

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, images, keys, E) of images (B, images, 3, h, w)."""
        pixels = pixel_values.flatten(0, 1)
        states = self.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        return self.vision2text_model(states).unflatten(0, pixel_values.shape[:2])

    def sees(self, index: Tensor, image_positions: Tensor) -> Tensor:
        """Return which rows of the text (s_q,) see which images: (B, s_q, images)."""
        latest = index[:, None] - (0 if self.config.fused else 1)
        return (image_positions >= 0)[:, None] & (image_positions[:, None] <= latest)

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
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            inputs.pop("pixel_values", None)
        return inputs

    def _check(self, positions: Tensor, input_ids: Tensor, S: int) -> None:
        B = len(input_ids)
        last = int(positions.max()) if positions.numel() else S
        if positions.ndim != 2 or len(positions) != B or last >= S:
            raise ValueError(
                f"image_positions: expected ({B}, 1 or more) below {S}, got "
                f"{tuple(positions.shape)} up to {last}"
            )

    def _rotation(self, y: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return cos and sin (B, 1, images, 1, D) of images whose tokens have these positions."""
        if not self.config.fused:
            position_ids = position_ids + 1
        cos_and_sin = self.language_model.model.rotary_emb(y, position_ids)  # (B, images, D)
        return tuple(x[:, None, :, None] for x in cos_and_sin)


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
