"""Idefics of transformers: an open Flamingo, gated cross-attention between a Llama's layers."""

from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn

from lvxattn.torch_impl.models.images import Images
from lvxattn.torch_impl.models.interception import ATTENTION, Interception
from lvxattn.torch_impl.models.text import Text, positions

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class Idefics(Images):
    """The model's mask says for each token and image whether it may attend.

    A token that may attend to none gets nothing: a gate closes, which is made of all images' mask.
    """

    # Before transformers 5 its rotary embeddings end at the number of rows that a rank has.
    texts = ("replicated",) if transformers.__version__ < "5" else ("replicated", "sharded")

    def __init__(self, model: Any, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.model: Any = getattr(model, "model", model)
        self.gate: Tensor | None = None  # (B, s_q)
        self.model.register_forward_pre_hook(self._take_mask, with_kwargs=True)
        model.set_attn_implementation({"": ATTENTION, "vision_config": "sdpa"})
        for layer in self.model.gated_cross_attn_layers:
            layer.register_forward_pre_hook(self._give_gate, with_kwargs=True)
            Interception(layer.cross_attn, spread)
        self.text: Text | None = None
        if spread.text == "sharded":
            self.text = Text([layer.self_attn for layer in self.model.layers], spread)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is an Idefics."""
        return type(model).__name__ in ("IdeficsModel", "IdeficsForVisionText2Text")

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut pixels, or what their encoder made of them."""
        mask, made = batch.get("image_attention_mask"), batch.get("image_encoder_embeddings")
        if mask is None or mask.ndim != 3:
            raise ValueError(
                "image_attention_mask: expected (B, S, images), "
                f"got {None if mask is None else tuple(mask.shape)}"
            )
        if made is not None and made.ndim != 4:
            raise ValueError(
                f"image_encoder_embeddings: expected (B, images, keys, E), got {tuple(made.shape)}"
            )
        if self.text is not None:
            position_ids, padding = positions(batch), batch.get("attention_mask")
            if padding is not None:  # as the model counts, which does not count padding
                position_ids = (padding.long().cumsum(-1) - 1).masked_fill(padding == 0, 1)
            batch = self.text.cut(batch, position_ids)
        return self.cut_images(batch, ("pixel_values", "image_encoder_embeddings"))

    def _take_mask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        pixels = kwargs.get("pixel_values")
        # Beside a cache the model is given what its encoder has made, of this rank's images.
        self.given = self.encoded.stop - self.encoded.start if pixels is None else pixels.shape[1]
        if self.text is not None:
            self.text.take_padding(kwargs)
        self.table = table = kwargs["image_attention_mask"].bool()  # (B, S_Q, images)
        self.gate = self.own_rows(table.any(-1))
        # In its place one of a single row: the model makes of it what is not used.
        kwargs["image_attention_mask"] = table.new_ones((table.shape[0], 1, self.given))
        return args, kwargs

    def _give_gate(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        assert self.gate is not None
        kwargs["cross_attention_gate"] = self.gate.to(self.model.dtype)
        return args, kwargs
