"""OpenFlamingo of its own package, whose layers compute attention themselves."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.models.images import Images
from lvxattn.torch_impl.models.interception import ATTENTION
from lvxattn.torch_impl.models.text import Text, positions

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class OpenFlamingo(Images):
    """A token attends to the last image before it, or to all before it.

    Sharded, the text is cut on its way into the language model, whose attention must call the
    attention function of transformers, as a Llama's does.
    """

    texts = ("replicated", "sharded")

    def __init__(self, model: Any, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.locations: Tensor | None = None  # (B, S), where images are in a sharded text
        for layer in model.modules():
            if type(layer).__name__ == "MaskedCrossAttention":
                _Layer(layer, self)
        self.text: Text | None = None
        if spread.text == "sharded":
            language_model = model.lang_encoder
            named = dict(language_model.named_modules())
            if not any(name.endswith("rotary_emb") for name in named):
                # Others number rows in ways of their own, where there is padding.
                raise ValueError(
                    f"text: expected 'replicated' for {type(language_model).__name__}, which has "
                    f"no rotary embeddings (on {spread.group.name})"
                )
            layers = [m for n, m in named.items() if n.endswith(("self_attn", ".attention"))]
            self.text = Text(layers, spread)
            language_model.set_attn_implementation(ATTENTION)
            language_model.register_forward_pre_hook(self._cut_text, with_kwargs=True)
            language_model.register_forward_hook(self._check_attention)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is a Flamingo."""
        return type(model).__name__ == "Flamingo"

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut the images."""
        return self.cut_images(batch, ("vision_x",))

    def _cut_text(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        assert self.text is not None
        self.spread.refuse_cache(kwargs)
        self.locations = kwargs["input_ids"] == module.media_token_id
        self.text.calls = 0
        kwargs = self.text.cut(kwargs, positions(kwargs))
        self.text.take_padding(kwargs)
        return args, kwargs | {"attention_mask": None}

    def _check_attention(self, module: Any, *_: Any) -> None:
        if self.text is not None and not self.text.calls:
            raise RuntimeError(
                f"text: expected 'replicated' for {type(module).__name__}, whose self-attention "
                f"did not call the attention function (on {self.spread.group.name})"
            )


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
        model.table, even = self._table(x, media_locations, use_cached_media)

        def make(x: Tensor, y: Tensor) -> Any:
            q = layer.to_q(layer.norm(x))
            if even is not None:
                q = q.masked_fill(even, 0.0)
            k, v = layer.to_kv(y.flatten(1, 2)).chunk(2, dim=-1)  # (B, s_kv, H x D)
            q, k, v = (a.unflatten(2, (layer.heads, -1)).transpose(1, 2) for a in (q, k, v))
            return q, k, v, layer.scale

        out, _ = model.spread.attend(make, x, media)
        merged: Tensor = layer.to_out(out.flatten(2))
        return merged

    def _table(
        self, x: Tensor, locations: Tensor | None, cached: bool | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return which rows see which images, and which of this rank's see all of them evenly.

        Where all scores are hidden, by one finite number, the layer's softmax is even.  With a
        query of 0 it is, too.
        """
        if self.model.text is not None:
            locations = self.model.locations
        if locations is None:
            return None, None
        if cached:  # all of x comes after the last image
            time = locations.sum(1, keepdim=True).expand(-1, x.shape[1])
        else:
            time = locations.cumsum(1)  # (B, S_Q): the number of images so far
        image = torch.arange(1, self.model.images + 1, device=x.device)
        last_only = self.layer.only_attend_immediate_media
        table = time[..., None] == image if last_only else time[..., None] >= image
        even = ~table.any(-1, keepdim=True)
        if last_only:  # the layer takes the result away before the first image
            even &= (time > 0)[..., None]
        return table | even, self.model.own_rows(even)
