"""A model whose visual input is spread over ranks: what is the same for all models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.validation import check_here_or_together
from lvxattn.torch_impl.cross_attention import attend, autocast_dtype, cast
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.models.adapter import Adapter
from lvxattn.torch_impl.models.batch_checks import check_equal, refuse_dropout
from lvxattn.torch_impl.models.gradients import OfForward, scale_gradient
from lvxattn.torch_impl.module import sum_gradients
from lvxattn.torch_impl.recompute import Made, node_of

# make(x, y) -> (q, k, v, scale): text and visual features to what attention needs.
Make = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, float]]


class Spread:
    """A model whose visual input is spread over ranks; made by `distribute`.

    Attributes
    ----------
    group : Group
        The ranks.
    text, schedule : str
    recompute_kv : bool
        As given to `distribute`.
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
        self._new = True  # no attention to this visual input has been computed
        self._batches = self._forwards = 0

    def inputs(self, **batch: Any) -> dict[str, Any]:
        """Return this rank's share of a batch.

        Collective: every rank calls this, before each forward with another visual input.

        Parameters
        ----------
        batch
            The model's keyword arguments for the whole batch; equal on all ranks, which is checked,
            but of real numbers only the shapes.  Images are only sliced, so that those of a
            memory-mapped file are read by the rank that they belong to.

        Returns
        -------
        dict
            The keyword arguments of the model, or of its `generate`, on this rank.  With sharded
            text they have ``num_items_in_batch``, so that the loss of one process is the mean of
            the ranks' losses.

        Raises
        ------
        ValueError, TypeError
            On every rank: the batch cannot be cut, or differs between ranks, or the model is in
            training and has dropout while every rank has the text.
        """
        cut: dict[str, Any] = {}

        def check() -> None:
            if self.text == "replicated":
                refuse_dropout(self.model)
            cut.update(self.adapter.cut(batch))

        check_here_or_together(check, self.group, together=True)
        check_equal(batch, self.group)
        self.renew()
        self._batches += 1
        return cut

    def renew(self) -> None:
        """Forget the layouts: there is another visual input."""
        self._layouts.clear()
        self._new = True

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
        recompute : bool
            Whether `make` may be called again in the backward, if the model recomputes.

        Returns
        -------
        out : (B, s_q, H, D_V)
        lse : (B, H, s_q)

        Raises
        ------
        ValueError, TypeError, RuntimeError
            The model was not given what `inputs` has cut, or its attention cannot be spread.  On
            every rank in the first call for a batch, later on this one.
        """
        scale, s_kv, made = 1.0, -1, None
        q = k = v = x
        mask: Tensor | MaskRule | None = None
        # P times: averaged over ranks, the gradients of what made keys and values are then whole,
        # as are those of the text model, which are the same on all ranks.
        factor = self.group.size if self.text == "replicated" else 1

        def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal scale, s_kv
            q, k, v, scale = make(x, y)
            if s_kv < 0:  # in the forward: in the backward another batch may have been cut
                s_kv = self.adapter.own(k.shape[2])
            k, v = (scale_gradient(made[:, :, :s_kv], factor) for made in (k, v))
            dtype = autocast_dtype(q)
            return cast(q, dtype), cast(k, dtype), cast(v, dtype)

        def saved(x: Tensor, y: Tensor) -> Any:
            return Made.apply(*both(x, y))  # type: ignore[no-untyped-call]

        def prepare() -> None:
            nonlocal q, k, v, made, mask
            if recompute and self.recomputes:
                q, k, v = checkpoint(saved, x, y, use_reentrant=False)
                made = node_of(q, k, v)
            else:
                q, k, v = both(x, y)
            mask = self.adapter.mask()

        check_here_or_together(prepare, self.group, together=self._new)
        self._new = False
        return self.attend_to(
            "cross-attention", q, k, v, made, scale=scale, mask=mask, schedule=self.schedule,
            queries="sharded" if self.text == "sharded" else "replicated", keys="sharded",
        )  # fmt: skip

    def attend_to(
        self, call: str, q: Tensor, k: Tensor, v: Tensor, made: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend from queries to all ranks' keys; agrees on a layout once for each visual input.

        Collective: every rank calls this.

        Parameters
        ----------
        call : str
            Describes the call in messages.  Calls of one description and of equal shapes on this
            rank share a layout; they must have equal shapes on every rank.
        q, k, v, made, options
            As for `torch_impl.cross_attention.attend`.

        Returns
        -------
        out : (B, s_q, H, D_V)
        lse : (B, H, s_q)
        """
        mask = options["mask"]
        key = call, q.shape, q.dtype, k.shape, v.shape, options["scale"], callable(mask)
        if key not in self._layouts:
            self._layouts[key] = Layout.agree(q, k, v, self.group, call=call, **options)
        q = OfForward.apply(q, self._forwards)  # type: ignore[no-untyped-call]
        layout = self._layouts[key]
        out, lse = attend(
            q, k, v, self.group, layout, made, return_lse=True, meter=self.meter, **options
        )
        return out.transpose(1, 2), lse

    def average_gradients(self) -> None:
        """Average the gradients of the model's parameters over the ranks, as DDP does.

        Collective: every rank calls this, once a step, after the backward.
        """
        sum_gradients(self.model, self.group)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad /= self.group.size

    def before_forward(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Check that a batch was cut, and make no cache in training unless asked for.

        A cache would keep the keys and values that are to be recomputed.
        """
        if not self._batches:
            raise RuntimeError(
                f"inputs: expected a batch from Spread.inputs (on {self.group.name})"
            )
        self._forwards += 1
        self.refuse_cache(kwargs)
        if self.recomputes or self.text == "sharded":
            kwargs.setdefault("use_cache", False)
        return args, kwargs

    def refuse_cache(self, kwargs: dict[str, Any]) -> None:
        """Check that no cache is asked for where the text is sharded."""
        if self.text == "sharded" and kwargs.get("use_cache"):
            raise ValueError(
                "use_cache: expected False with text='sharded'; use text='replicated' to generate "
                f"(on {self.group.name})"
            )
