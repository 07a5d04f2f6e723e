"""OpenFlamingo of its own package, whose layers compute attention themselves."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.models.images import Images

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class OpenFlamingo(Images):
    """A token attends to the last image before it, or to all before it."""

    def __init__(self, model: nn.Module, spread: "Spread") -> None:
        super().__init__(model, spread)
        for layer in model.modules():
            if type(layer).__name__ == "MaskedCrossAttention":
                _Layer(layer, self)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is a Flamingo."""
        return type(model).__name__ == "Flamingo"

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut the images."""
        return self.cut_images(batch, ("vision_x",))


class _Layer:
    """The forward of a MaskedCrossAttention, with the attention of a `Spread`."""

    def __init__(self, layer: Any, model: OpenFlamingo) -> None:
        self.layer, self.model = layer, model
        layer.forward = self.forward

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        """Attend from text to images, as the layer does."""
        layer, model = self.layer, self.model
        model.given = media.shape[1]
        model.table = self._table(x, media_locations, use_cached_media)

        def make(x: Tensor, y: Tensor) -> Any:
            q = layer.to_q(layer.norm(x))
            k, v = layer.to_kv(y.flatten(1, 2)).chunk(2, dim=-1)  # (B, s_kv, H x D)
            q, k, v = (a.unflatten(2, (layer.heads, -1)).transpose(1, 2) for a in (q, k, v))
            return q, k, v, layer.scale

        out, _ = model.spread.attend(make, x, media)
        merged: Tensor = layer.to_out(out.flatten(2))
        return merged

    def _table(self, x: Tensor, locations: Tensor | None, cached: bool) -> Tensor | None:
        if locations is None:
            return None
        if cached:  # all of x comes after the last image
            time = locations.sum(1, keepdim=True).expand(-1, x.shape[1])
        else:
            time = locations.cumsum(1)  # (B, s_q): the number of images so far
        image = torch.arange(1, self.model.images + 1, device=x.device)
        last_only = self.layer.only_attend_immediate_media
        table = time[..., None] == image if last_only else time[..., None] >= image
        # Where all scores are hidden the layer's softmax sees all alike; before the first image it
        # then takes the result away, if it attends to the last image only.
        dead = ~table.any(-1, keepdim=True)
        return table | (dead & (time > 0)[..., None] if last_only else dead)
