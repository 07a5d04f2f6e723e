"""Any encoder and decoder of transformers whose cross-attention calls the attention function."""

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lvxattn.torch_impl.models.adapter import Adapter
from lvxattn.torch_impl.models.interception import ATTENTION, FEATURES, Interception

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread

# How decoders' layers name their cross-attention.
LAYERS = "encoder_attn", "cross_attn", "crossattention.attention"
MASK = "encoder_attention_mask"
# Arguments of layers with the positions of keys, which would have to be cut, too (DETR).
PLACES = "encoder_position_embeddings", "spatial_position_embeddings"


class EncoderDecoder(Adapter):
    """The encoder runs whole on every rank, and its output is cut."""

    def __init__(self, model: Any, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.mine = range(0)
        self.cut_already: Callable[[], Tensor | None] = lambda: None
        self.padding: Tensor | None = None  # (B, S_KV), 0 where a row is padding
        encoder = _encoder(model)
        if encoder is not None:
            encoder.register_forward_hook(self._cut_output)
        # Where the mask comes in: the decoder, which comes before its layers.
        takes_mask = next(m for m in model.modules() if MASK in _parameters(m))
        takes_mask.register_forward_pre_hook(self._take_mask, with_kwargs=True)
        model.set_attn_implementation(ATTENTION)
        for layer in _layers(model):
            Interception(layer, spread)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether the model has cross-attention layers that can be spread."""
        takes_mask = any(MASK in _parameters(m) for m in model.modules())
        return isinstance(model, PreTrainedModel) and takes_mask and bool(_layers(model))

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut what an encoder has made already."""
        batch = dict(batch)
        if batch.get("encoder_hidden_states") is not None:
            batch["encoder_hidden_states"] = self._cut_rows(batch["encoder_hidden_states"])
        if batch.get("encoder_outputs") is not None:
            batch["encoder_outputs"] = self._cut_outputs(batch["encoder_outputs"])
        return batch

    def own(self, s_kv: int) -> int:
        """Return the number of this rank's keys."""
        if s_kv != max(1, len(self.mine)):
            raise ValueError(
                f"inputs: expected {max(1, len(self.mine))} of the encoder's rows, as "
                f"Spread.inputs has cut them, got {s_kv}"
            )
        return len(self.mine)

    def mask(self) -> Tensor | None:
        """Return the padding of this rank's rows."""
        if self.padding is None:
            return None
        if self.padding.ndim != 2:
            raise ValueError(f"{MASK}: expected (B, S_KV), got {tuple(self.padding.shape)}")
        return self.padding[:, None, None, self.mine.start : self.mine.stop].bool()

    def _cut_rows(self, y: Tensor) -> Tensor:
        self.spread.renew()
        if y is self.cut_already():  # by the hook of the encoder, and given to `cut`
            return y
        self.mine = self.spread.share(y.shape[1])
        start = self.mine.start if self.mine else 0
        cut = y[:, start : start + max(1, len(self.mine))]
        self.cut_already = weakref.ref(cut)
        return cut

    def _cut_outputs(self, outputs: Any) -> Any:
        if isinstance(outputs, tuple):
            return self._cut_rows(outputs[0]), *outputs[1:]
        cut = copy.copy(outputs)
        cut.last_hidden_state = self._cut_rows(outputs.last_hidden_state)
        return cut

    def _cut_output(self, _: nn.Module, _args: Any, outputs: Any) -> Any:
        return self._cut_outputs(outputs)

    def _take_mask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.padding = kwargs.pop(MASK, None)
        return args, kwargs


def _encoder(model: Any) -> nn.Module | None:
    """Return the model's encoder; None where the caller brings what one has made."""
    encoder: nn.Module | None = model.get_encoder() if model.config.is_encoder_decoder else None
    return encoder


def _layers(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(LAYERS)
        and set(FEATURES) & set(_parameters(module))
        and not set(PLACES) & set(_parameters(module))
    ]


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)
