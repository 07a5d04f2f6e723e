"""Llama 3.2 Vision of transformers: cross-attention layers between those of a Llama."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lvxattn.torch_impl.models.images import Images
from lvxattn.torch_impl.models.interception import ATTENTION, Interception

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class Mllama(Images):
    """Images have tiles, and the model's mask says for each token and tile whether it may attend.

    A token that may attend to none attends to all, and the layer's MLP leaves it alone.  Made as
    the model makes it, the mask would be as large as the scores.  Here it stays a table of tiles.
    """

    def __init__(self, model: Any, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.model: Any = getattr(model, "model", model)
        self.seen: Tensor | None = None  # (B, 1, s_q, 1), whether a token may attend to any image
        self.model.register_forward_pre_hook(self._take_mask, with_kwargs=True)
        self.model.language_model.register_forward_pre_hook(self._give_rows, with_kwargs=True)
        model.set_attn_implementation({"text_config": ATTENTION})
        for n in self.model.language_model.cross_attention_layers:
            Interception(self.model.language_model.layers[n].cross_attn, spread)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is an Mllama."""
        return type(model).__name__ in ("MllamaModel", "MllamaForConditionalGeneration")

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut pixels, aspect ratios and their masks."""
        return self.cut_images(batch, ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))

    def _take_mask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None:
            self.check_images(kwargs["pixel_values"].shape[1])
        mask = kwargs.pop("cross_attention_mask", None)
        self.table = self.seen = None
        if mask is None:
            return args, kwargs
        ids = kwargs.get("input_ids")
        length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        if mask.shape[1] != length:  # of the whole text, beside a cache
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            past = 0 if cache is None else int(cache.get_seq_length())
            mask = mask[:, past : past + length]
        table = mask.flatten(2).bool()  # (B, s_q, images x tiles)
        seen = table.any(-1, keepdim=True)
        self.table, self.per_image = table | ~seen, mask.shape[3]
        self.seen = seen[:, None]
        return args, kwargs

    def _give_rows(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.seen is not None:
            kwargs["full_text_row_masked_out_mask"] = self.seen.to(self.model.dtype)
        return args, kwargs
