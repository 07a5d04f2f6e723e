"""A model whose visual input is spread over ranks: what is the same for all models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.torch_impl.cross_attention import attend
from lvxattn.torch_impl.group import AnyGroup, Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.module import sum_gradients
from lvxattn.torch_impl.recompute import Made

# make(x, y) -> (q, k, v, scale): text and visual features to what attention needs.
Make = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, float]]


class Adapter:
    """What a kind of model needs to be spread: how its input is cut, and its masks.

    Parameters
    ----------
    model : Module
    spread : Spread
    """

    def __init__(self, model: nn.Module, spread: "Spread") -> None:
        self.model: Any = model
        self.spread = spread

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is a model of the kind."""
        raise NotImplementedError

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's share of a batch."""
        raise NotImplementedError

    def own(self, s_kv: int) -> int:
        """Return how many keys of those made are this rank's: the first ones.

        Raises
        ------
        ValueError
            Another number cannot have come from `cut`.
        """
        raise NotImplementedError

    def mask(self) -> Tensor | MaskRule | None:
        """Return the mask of the forward that is under way; called after `own`."""
        raise NotImplementedError


class Spread:
    """A model whose visual input is spread over ranks; made by `distribute`.

    Attributes
    ----------
    group : Group
        The ranks.
    recompute_kv : bool
        Whether cross-attention layers make their keys and values again in the backward.
    meter : Meter, optional
        Adds up messages, bytes and seconds of the attention, of the backward too; set it at any
        time.
    """

    def __init__(
        self, model: nn.Module, group: Group, *, text: str, schedule: str, recompute_kv: bool
    ) -> None:
        self.model, self.group = model, group
        self.text, self.schedule, self.recompute_kv = text, schedule, recompute_kv
        self.adapter: Adapter = Adapter(model, self)
        self.meter: Meter | None = None
        self._layouts: dict[Any, Layout] = {}
        self._cut = False

    def inputs(self, **batch: Any) -> dict[str, Any]:
        """Return this rank's share of a batch.

        Parameters
        ----------
        batch
            The model's keyword arguments for the whole batch; equal on all ranks.
        """
        self.renew()
        self._cut = True
        return self.adapter.cut(batch)

    def renew(self) -> None:
        """Forget the layouts: there is another visual input."""
        self._layouts.clear()

    @property
    def recomputes(self) -> bool:
        """Whether keys and values are to be recomputed, at this moment."""
        return self.recompute_kv and torch.is_grad_enabled()

    def share(self, n: int) -> range:
        """Return which of n images, or rows, are this rank's."""
        rank, size = self.group.rank, self.group.size
        return range(n * rank // size, n * (rank + 1) // size)

    def attend(
        self, make: Make, x: Tensor, y: Tensor, *, recompute: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Attend from the text to all ranks' keys.

        Collective: every rank calls this.

        Parameters
        ----------
        make : callable
            ``make(x, y) -> (q, k, v, scale)``
        x, y : Tensor
            This rank's text and visual features.

        Returns
        -------
        out : (B, s_q, H, D_V)
        lse : (B, H, s_q)
        """
        if not self._cut:
            raise RuntimeError(
                f"inputs: expected a batch from Spread.inputs (on {self.group.name})"
            )
        scale, s_kv = 1.0, -1

        def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal scale, s_kv
            q, k, v, scale = make(x, y)
            if s_kv < 0:  # in the forward: in the backward another batch may have been cut
                s_kv = self.adapter.own(k.shape[2])
            # P times: averaged over ranks, the gradients of what made keys and values are then
            # whole, as are those of the text model, which are the same on all ranks.
            k, v = (scale_gradient(x[:, :, :s_kv], self.group.size) for x in (k, v))
            return q, k, v

        def saved(x: Tensor, y: Tensor) -> Any:
            return Made.apply(*both(x, y))  # type: ignore[no-untyped-call]

        if recompute and self.recomputes:
            q, k, v = checkpoint(saved, x, y, use_reentrant=False)
            made = q.grad_fn
        else:
            (q, k, v), made = both(x, y), None
        mask = self.adapter.mask()
        options: dict[str, Any] = {"scale": scale, "mask": mask, "queries": self.text}
        key = q.shape, q.dtype, k.shape, v.shape, scale, callable(mask)
        if key not in self._layouts:
            self._layouts[key] = Layout.agree(
                q, k, v, self.group, schedule=self.schedule, call="a model's attention", **options
            )
        out, lse = attend(
            q, k, v, self.group, self._layouts[key], made, schedule=self.schedule,
            return_lse=True, meter=self.meter, **options,
        )  # fmt: skip
        return out.transpose(1, 2), lse

    def average_gradients(self) -> None:
        """Average the gradients of the model's parameters over the ranks, as DDP does.

        Collective: every rank calls this, once a step, after the backward.
        """
        sum_gradients(self.model, self.group)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad /= self.group.size

    def without_cache(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make no cache in training unless asked for: it would keep what is to be recomputed."""
        if self.recomputes:
            kwargs.setdefault("use_cache", False)
        return args, kwargs


def scale_gradient(x: Tensor, factor: int) -> Tensor:
    """Return x, whose gradient will be multiplied by a factor."""
    return ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]


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
    """Shard the visual input of a multimodal model over ranks.  Changes the model in place.

    Every rank has the whole model and the same weights, encodes its own images, and keeps their
    keys and values; cross-attention is over all ranks' keys.  Not collective.

    Parameters
    ----------
    model : Module
        Of transformers: Mllama (Llama 3.2 Vision), Idefics, Whisper, or another encoder and decoder
        whose cross-attention calls the model's attention function; or OpenFlamingo's ``Flamingo``.
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        The ranks; default: the world.
    text : str
        ``"replicated"``: every rank has the whole text.
    schedule : str
        As in `cross_attention`; with replicated text there is nothing to choose.
    recompute_kv : bool
        Whether a backward makes keys and values again instead of keeping them.

    Returns
    -------
    Spread

    Raises
    ------
    ValueError
        A model without cross-attention that can be spread, or that was distributed before, or
        another `text`.

    Examples
    --------
    On every rank, for a model and a batch of transformers:

    >>> spread = distribute(model, group)  # doctest: +SKIP
    >>> model(**spread.inputs(**batch)).loss.backward()  # doctest: +SKIP
    >>> spread.average_gradients()  # doctest: +SKIP
    """
    from lvxattn.torch_impl.models.encoder_decoder import EncoderDecoder
    from lvxattn.torch_impl.models.idefics import Idefics
    from lvxattn.torch_impl.models.mllama import Mllama
    from lvxattn.torch_impl.models.openflamingo import OpenFlamingo
    from lvxattn.torch_impl.models.owl3_adapter import SpreadOwl3

    comm = Group.of(group)
    if text != "replicated":
        raise ValueError(f"text: expected 'replicated', got {text!r} (on {comm.name})")
    hooks = model._forward_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), Spread) for hook in hooks):
        raise ValueError(f"model: expected one that is not distributed yet (on {comm.name})")
    for kind in (Mllama, Idefics, OpenFlamingo, SpreadOwl3, EncoderDecoder):
        if kind.fits(model):
            spread = Spread(model, comm, text=text, schedule=schedule, recompute_kv=recompute_kv)
            spread.adapter = kind(model, spread)
            model.register_forward_pre_hook(spread.without_cache, with_kwargs=True)
            return spread
    raise ValueError(
        "model: expected Mllama, Idefics, Whisper, OpenFlamingo, or an encoder and decoder of "
        f"transformers, got {type(model).__name__} (on {comm.name})"
    )
