"""A model whose visual input is spread over ranks: what is the same for all models."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lvxattn.common.masks import MaskRule
from lvxattn.torch_impl.autograd import Attention
from lvxattn.torch_impl.cross_attention import agreed, passes
from lvxattn.torch_impl.group import AnyGroup, Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.recompute import Made


class Adapter(Protocol):
    """What a kind of model needs to be spread."""

    def layers(self) -> list[tuple[nn.Module, str]]:
        """Return the cross-attention layers, each with its argument for visual features."""

    def cut(self, batch: dict[str, Any], rank: int, size: int) -> tuple[dict[str, Any], int]:
        """Return a rank's share of a batch, and how many keys it holds."""

    def rule(self) -> MaskRule | None:
        """Return which query may attend to which of all ranks' keys, at this moment."""


class Spread:
    """A model whose visual input is spread over ranks.

    Made by `distribute`.

    Attributes
    ----------
    group : Group
        The ranks.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, group: Group, *, text: str, schedule: str,
        recompute_kv: bool,
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.group = model, adapter, group
        self.text, self.schedule, self.recompute_kv = text, schedule, recompute_kv
        self._layouts: dict[Any, Layout] = {}
        self._s_kv: int | None = None

    def inputs(self, **batch: Any) -> dict[str, Any]:
        """Return this rank's share of a batch.

        Parameters
        ----------
        batch
            The model's keyword arguments for the whole batch; equal on all ranks.
        """
        local, self._s_kv = self.adapter.cut(batch, self.group.rank, self.group.size)
        self._layouts.clear()
        return local

    def prepare(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a layer made, its keys and values with gradients P times as large.

        Averaged over ranks, the gradients of whatever made them are then whole, as are those of
        the text, which are the same on all ranks.
        """
        s_kv = self._s_kv
        if s_kv is None:
            raise RuntimeError("inputs: call Spread.inputs for the batch first")
        if s_kv == 0:  # one image was encoded, or it could not have been: it is not this rank's
            k, v = k[:, :, :0], v[:, :, :0]
        if k.shape[2] != s_kv:
            raise ValueError(
                f"inputs: expected {s_kv} keys, as Spread.inputs has cut them, got {k.shape[2]} "
                f"(on {self.group.name})"
            )
        P = self.group.size
        return q, ScaledGradient.apply(k, P), ScaledGradient.apply(v, P)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend from the text to all ranks' keys: (B, s_q, H, D_V)."""
        rule, queries = self.adapter.rule(), self.text
        key = q.shape, q.dtype, k.shape, v.shape, rule is None
        layout = self._layouts.get(key)
        if layout is None:
            layout = agreed(
                q, k, v, self.group, None, schedule=self.schedule, scale=scale, mask=rule,
                queries=queries, call="a model's cross-attention",
            )  # fmt: skip
            self._layouts[key] = layout
        else:
            layout.check(q, k, v, self.group, scale=scale, mask=rule, queries=queries)
        made = q.grad_fn if isinstance(q.grad_fn, Made._backward_cls) else None
        out, _ = Attention.apply(
            q, k, v, rule, self.group, layout, *passes(layout, self.group), None, made
        )
        return out.transpose(1, 2)

    def _no_cache(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make no cache in training unless asked for: it would keep what is to be recomputed."""
        if self.recompute_kv and torch.is_grad_enabled():
            kwargs.setdefault("use_cache", False)
        return args, kwargs

    def average_gradients(self) -> None:
        """Average the parameters' gradients over the ranks, as DDP does.  Collective."""
        for p in self.model.parameters():
            if p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                dist.all_reduce(p.grad, group=self.group.group)
                p.grad /= self.group.size


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        """Return x."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        return dx * ctx.factor, None


def distribute(
    model: nn.Module,
    group: AnyGroup = None,
    *,
    text: str = "replicated",
    schedule: str = "lv-xattn",
    recompute_kv: bool = True,
) -> Spread:
    """Spread the visual input of a multimodal model over ranks."""
    from lvxattn.torch_impl.models.interception import ATTENTION, Interception
    from lvxattn.torch_impl.models.mllama import Mllama

    adapter = Mllama(model)
    spread = Spread(
        model, adapter, Group.of(group), text=text, schedule=schedule, recompute_kv=recompute_kv
    )
    model.set_attn_implementation({"": "sdpa", "text_config": ATTENTION})
    for layer, features in adapter.layers():
        Interception(layer, features, spread)
    model.register_forward_pre_hook(spread._no_cache, with_kwargs=True)
    return spread
