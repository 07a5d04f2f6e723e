"""The model of `owl3`, whose images are spread over ranks."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.models.hyper_attention import HyperAttention, position_of
from lvxattn.torch_impl.models.images import Images
from lvxattn.torch_impl.models.interception import ATTENTION
from lvxattn.torch_impl.models.spread import Make
from lvxattn.torch_impl.models.text import Text, positions

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class SpreadOwl3(Images):
    """Every rank knows where all images are in the text, and rotates its own to their places."""

    texts = ("replicated", "sharded")

    def __init__(self, model: Any, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.rows: Tensor | None = None  # (B, S_Q, images), which row of all ranks' sees which
        model.attend, model.given = self.attend, self.encoded_of
        self.text: Text | None = None
        if spread.text == "sharded":
            layers = [layer.self_attn for layer in model.language_model.model.layers]
            self.text = Text(layers, spread)
            for layer in layers:
                if isinstance(layer, HyperAttention):
                    layer.attend_to_text = self._attend_to_text
            model.language_model.set_attn_implementation(ATTENTION)
            if model.config.text_config.use_sliding_window:
                raise ValueError(
                    "text: expected 'replicated' for an Owl3 with use_sliding_window "
                    f"(on {spread.group.name})"
                )
            model.register_forward_pre_hook(self._take_text, with_kwargs=True)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is an Owl3."""
        return type(model).__name__ == "Owl3"

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut the images, and note where all of them are."""
        cut = self.cut_images(batch, ("pixel_values",))
        if cut.get("image_positions") is None:
            cut["image_positions"] = self.model.find_images(batch["input_ids"], self.images)
        self.given = self.encoded.stop - self.encoded.start  # or the model raises
        if self.text is None:
            return cut
        S_Q, where = batch["input_ids"].shape[1], cut["image_positions"]
        cut["image_position_ids"] = position_of(where, batch.get("position_ids"))
        cut["rows"] = self.spread.share(S_Q).start, S_Q
        return self.text.cut(cut, positions(cut))

    def attend(
        self, make: Make, q: Tensor, y: Tensor, table: Tensor, *, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend to all ranks' images."""
        self.images = table.shape[2]
        self.table = table if self.rows is None else self.rows
        return self.spread.attend(make, q, y, recompute=recompute)

    def _attend_to_text(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, _: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self.text is not None
        return self.text.attend(q, k, v, scale)

    def _take_text(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        assert self.text is not None
        self.text.take_padding(kwargs)
        where = kwargs["image_positions"]
        self.rows = model.sees(torch.arange(kwargs["rows"][1], device=where.device), where)
        return args, kwargs
