"""Llama 3.2 Vision of transformers: cross-attention layers between those of a Llama."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lvxattn.torch_impl.models.images import Images
from lvxattn.torch_impl.models.interception import ATTENTION, Interception
from lvxattn.torch_impl.models.text import Text, positions

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread

FEATURES = "cross_attention_states"


class Mllama(Images):
    """Images have tiles, and the model's mask says for each token and tile whether it may attend.

    A token that may attend to none attends to all, and the layer's MLP leaves it alone.  Made as
    the model makes it, the mask would be as large as the scores.  Here it stays a table of tiles.

    Without a mask every token attends to all tiles.  In transformers, SDPA takes a missing mask for
    a causal one, over image keys, unless the layers' `is_causal` is False.
    """

    texts = ("replicated", "sharded")

    def __init__(self, model: Any, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.model: Any = getattr(model, "model", model)
        self.features: range | None = None  # this rank's, where features are given for images
        self.seen: Tensor | None = None  # (B, 1, s_q, 1), whether a token may attend to any image
        language_model = self.model.language_model
        self.model.register_forward_pre_hook(self._take_mask, with_kwargs=True)
        language_model.register_forward_pre_hook(self._give_rows, with_kwargs=True)
        model.set_attn_implementation({"text_config": ATTENTION})
        cross = language_model.cross_attention_layers
        for n in cross:
            Interception(language_model.layers[n].cross_attn, spread)
        self.text: Text | None = None
        if spread.text == "sharded":
            layers = enumerate(language_model.layers)
            self.text = Text([layer.self_attn for n, layer in layers if n not in cross], spread)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is an Mllama."""
        return type(model).__name__ in ("MllamaModel", "MllamaForConditionalGeneration")

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut pixels, aspect ratios and their masks; or features that are given for them."""
        if self.text is not None:
            batch = self.text.cut(batch, positions(batch))
        features = batch.get(FEATURES)
        if features is None:
            self.features = None
            if batch.get("pixel_values") is None:  # text alone, which passes by the images' layers
                return batch
            self.tiles = batch["pixel_values"].shape[2]
            return self.cut_images(batch, ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
        self.S_KV, self.features = features.shape[1], self.spread.share(features.shape[1])
        return {**batch, FEATURES: features[:, self.features.start : self.features.stop]}

    def own(self, s_kv: int) -> int:
        """Return the number of this rank's keys."""
        if self.features is None:
            return super().own(s_kv)
        if s_kv != len(self.features):
            raise ValueError(
                f"{FEATURES}: expected {len(self.features)} rows, as Spread.inputs has cut them, "
                f"got {s_kv}"
            )
        return s_kv

    def _take_mask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None:
            self.given = kwargs["pixel_values"].shape[1]
        if self.text is not None:
            self.text.take_padding(kwargs)
        mask = kwargs.pop("cross_attention_mask", None)
        self.table = self.seen = None
        if mask is None:
            return args, kwargs
        ids = kwargs.get("input_ids")
        length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        if self.text is None and mask.shape[1] != length:  # of the whole text, beside a cache
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            past = 0 if cache is None else int(cache.get_seq_length())
            mask = mask[:, past : past + length]
        if self.features is not None:  # of images that nobody has counted
            self.images, self.tiles = mask.shape[2:]
        table = mask.flatten(2).bool()  # (B, S_Q, images x tiles)
        seen = table.any(-1, keepdim=True)
        self.table = table | ~seen
        self.seen = self.own_rows(seen)[:, None]
        return args, kwargs

    def _give_rows(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.seen is not None:
            kwargs["full_text_row_masked_out_mask"] = self.seen.to(self.model.dtype)
        return args, kwargs
