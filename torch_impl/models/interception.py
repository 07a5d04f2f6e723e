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

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lvxattn.torch_impl.recompute import Made

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread

ATTENTION = "lvxattn"
CACHES = "cache", "past_key_values", "past_key_value"  # names of a layer's argument


class _Reached(Exception):  # noqa: N818
    """Leaves a layer's forward at its attention, with what that was called with."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        super().__init__()
        self.made = q, k, v
        self.scale = scale


class Interception:
    """A cross-attention layer whose attention is that of a `Spread`.

    Parameters
    ----------
    layer : Module
        Its forward takes text features first, and calls the model's attention function.
    features : str
        The name of the forward's argument that takes the visual features.
    """

    def __init__(self, layer: nn.Module, features: str, spread: "Spread") -> None:
        self.spread, self.features = spread, features
        self._forward = layer.forward
        self._signature = inspect.signature(layer.forward)
        self._leave = False  # at the attention
        self._result: Tensor | None = None  # of the attention, where it is known
        layer.forward = self.forward
        layer.lvxattn = self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; in two parts, if keys and values are to be recomputed."""
        given = self._signature.bind(*args, **kwargs)
        features = given.arguments.get(self.features)
        recompute = self.spread.recompute_kv and torch.is_grad_enabled()
        # A cache keeps the keys and values in any case.
        if features is None or not recompute or any(given.arguments.get(c) is not None for c in CACHES):
            return self._forward(*args, **kwargs)
        text = next(iter(given.arguments))
        scale = None

        def make(x: Tensor, y: Tensor) -> Any:
            nonlocal scale
            given.arguments.update({text: x, self.features: y})
            with self._set(leave=True):
                try:
                    self._forward(*given.args, **given.kwargs)
                except _Reached as reached:
                    scale = reached.scale
                    return Made.apply(*self.spread.prepare(*reached.made))
            raise RuntimeError(f"{type(self).__name__}: the layer called no attention")

        # 1. Make queries, keys and values.
        x = given.arguments[text]
        q, k, v = checkpoint(make, x, features, use_reentrant=False)
        # 2. Attend to them; with the end of this call they are forgotten.
        out = self.spread.attend(q, k, v, scale)
        # 3. Run the rest of the layer.
        given.arguments.update({text: x, self.features: features[: x.shape[0], :1]})
        with self._set(result=out):
            return self._forward(*given.args, **given.kwargs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Compute, or return, what the layer's attention is to return: (B, s_q, H, D_V)."""
        if self._leave:
            raise _Reached(q, k, v, scale)
        if self._result is not None:
            return self._result
        return self.spread.attend(*self.spread.prepare(q, k, v), scale)

    @contextmanager
    def _set(self, *, leave: bool = False, result: Tensor | None = None) -> Iterator[None]:
        before = self._leave, self._result
        self._leave, self._result = leave, result
        try:
            yield
        finally:
            self._leave, self._result = before


def attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *args: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's attention, in the form that transformers asks for."""
    layer: Interception | None = getattr(module, "lvxattn", None)
    if layer is None:
        return sdpa_attention_forward(
            module, q, k, v, mask, *args, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"dropout: expected 0 in {type(module).__name__}, got {dropout}: ranks would not drop "
            f"what one process drops (on {layer.spread.group.name})"
        )
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attention(q, k, v, scale), None


AttentionInterface.register(ATTENTION, attention)
# Without a mask function of this name self-attention would get no mask at all.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
