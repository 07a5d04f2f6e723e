"""Take the queries, keys and values of a layer of transformers, and return the result over ranks.

Models of transformers look their attention function up by name.  `ATTENTION` is registered as one:
layers that were spread hand it their q, k and v; all other attention goes on to PyTorch's SDPA.

Where keys and values are recomputed, a layer's forward runs twice, and what it is does not matter:

    up to the attention    in a checkpoint: q, k and v are made, and in the backward made again
    from the attention on  with one visual feature, so that no keys are made, and with the result
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread
    from lvxattn.torch_impl.models.text import Text

ATTENTION = "lvxattn"
# A layer's argument for visual features, and for a cache, in any of the models.
FEATURES = "cross_attention_states", "key_value_states", "encoder_hidden_states"
CACHES = "cache", "past_key_values", "past_key_value"


class _Reached(Exception):  # noqa: N818
    """Leaves a layer's forward at its attention, with what that was called with."""

    def __init__(self, *made: Any) -> None:
        super().__init__()
        self.made = made


class Interception:
    """A cross-attention layer whose attention is that of a `Spread`.

    Parameters
    ----------
    layer : Module
        Its forward takes text features first, one of `FEATURES`, and calls the attention function
        that the model was given.
    """

    def __init__(self, layer: Any, spread: "Spread") -> None:
        self.spread, self.name = spread, type(layer).__name__
        self._forward = layer.forward
        self._signature = inspect.signature(layer.forward)
        names = tuple(self._signature.parameters)
        self._text, (self._features,) = names[0], [name for name in names if name in FEATURES]
        self._leave = False  # at the attention
        self._result: Tensor | None = None  # of the attention, where it is known
        self._calls = 0
        layer.forward = self.forward
        layer.lvxattn = self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; in two parts, if keys and values are to be recomputed."""
        given = self._signature.bind(*args, **kwargs)
        x: Tensor = given.arguments[self._text]
        y: Tensor | None = given.arguments.get(self._features)
        caches = [given.arguments.get(name) for name in CACHES]
        if y is None or not self.spread.recomputes or any(cache is not None for cache in caches):
            before = self._calls
            result = self._forward(*args, **kwargs)
            if self._calls == before:
                raise RuntimeError(f"{self._unsupported()} (on {self.spread.group.name})")
            return result

        def make(x: Tensor, y: Tensor) -> Any:
            given.arguments.update({self._text: x, self._features: y})
            try:
                with self._set(leave=True):
                    self._forward(*given.args, **given.kwargs)
            except _Reached as reached:
                return reached.made
            raise RuntimeError(self._unsupported())

        out, _ = self.spread.attend(make, x, y)
        given.arguments.update({self._text: x, self._features: y[: x.shape[0], :1]})
        with self._set(result=out):
            return self._forward(*given.args, **given.kwargs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Compute, or return, what the layer's attention is to return: (B, s_q, H, D_V)."""
        self._calls += 1
        if self._leave:
            raise _Reached(q, k, v, scale)
        if self._result is not None:
            return self._result
        out, _ = self.spread.attend(lambda q, k: (q, k, v, scale), q, k, recompute=False)
        return out

    @contextmanager
    def _set(self, *, leave: bool = False, result: Tensor | None = None) -> Iterator[None]:
        before = self._leave, self._result
        self._leave, self._result = leave, result
        try:
            yield
        finally:
            self._leave, self._result = before

    def _unsupported(self) -> str:
        return (
            f"model: expected {self.name} to call the attention function {ATTENTION!r}, and it did "
            "not: its attention cannot be spread, or set_attn_implementation has changed it"
        )


def attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's attention, in the form that transformers asks for."""
    layer: Interception | Text | None = getattr(module, "lvxattn", None)
    if layer is None:
        return sdpa_attention_forward(
            module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"dropout: expected 0 in {layer.name}, got {dropout}: ranks would not drop what one "
            "process drops"
        )
    # The mask of a sharded text is made here, without a window.
    names = "softcap", "position_bias", *["sliding_window"] * (not isinstance(layer, Interception))
    for name in names:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None in {layer.name}: not supported")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attention(q, k, v, scale), None


AttentionInterface.register(ATTENTION, attention)
# Without a mask function of this name self-attention would get no mask at all.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
