"""Text that is sharded over ranks: what a rank is given of it, and its self-attention."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.cross_attention import autocast_dtype, cast

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class Text:
    """The text of a causal language model whose layers call the attention function.

    Every rank has some rows of the text, with their positions in the whole.  Attention from each
    row to those before it, on any rank, is `cross_attention` with a causal rule.

    Parameters
    ----------
    layers : iterable of Module
        The layers of self-attention.
    spread : Spread
    """

    def __init__(self, layers: Iterable[Any], spread: "Spread") -> None:
        self.spread, self.name = spread, "self-attention"
        self.padding: Tensor | None = None  # (B, S), 0 where a row is padding
        self.length = 0  # S
        self.calls = 0
        for layer in layers:
            layer.lvxattn = self

    def cut(self, batch: dict[str, Any], position_ids: Tensor) -> dict[str, Any]:
        """Return the batch with this rank's rows, their positions and labels.

        Masks stay whole: each rank's keys are seen from all rows.

        Parameters
        ----------
        batch : dict
        position_ids : (1 or B, S)
            Those that the model uses unless the batch has others.
        """
        size, S = self.spread.group.size, position_ids.shape[1]
        if size > S:
            raise ValueError(
                f"text: expected at least {size} rows, one for each rank, to be sharded, got {S}"
            )
        self.length = S
        padding = batch.get("attention_mask")
        if padding is not None and padding.ndim != 2:
            raise ValueError(f"attention_mask: expected (B, S), got {tuple(padding.shape)}")
        given = batch.get("position_ids")
        if given is not None and padding is None and (given.diff() != 1).any():
            # transformers takes them for several texts, which do not see each other.
            raise ValueError(
                "position_ids: expected each to be one more than the one before, or an "
                "attention_mask: packed texts cannot be sharded"
            )
        cut = {**batch, "position_ids": position_ids if given is None else given}
        labels, count = cut.pop("labels", None), cut.pop("num_items_in_batch", None)
        if labels is not None:
            shifted = cut.get("shift_labels")
            if shifted is None:
                shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            cut["shift_labels"] = shifted
            cut["labels"] = labels  # without which the model computes no loss
            # A rank's loss is P times its part of the mean over all tokens, so that the mean of the
            # ranks' losses, and of their gradients, is that of one process.
            count = (shifted != -100).sum() if count is None else count
            cut["num_items_in_batch"] = float(count) / size
        names = "input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels"
        for name in names:
            if cut.get(name) is not None:
                rows = self.spread.share(cut[name].shape[1])
                cut[name] = cut[name][:, rows.start : rows.stop].contiguous()
        return cut

    def take_padding(self, kwargs: dict[str, Any]) -> None:
        """Take the padding mask out of a forward's arguments, and check that its rows were cut.

        Raises
        ------
        ValueError
            On this rank; if no rank's were cut, on every one.
        """
        rows = kwargs.get("input_ids")
        rows = kwargs["inputs_embeds"] if rows is None else rows
        expected = len(self.spread.share(self.length))
        if rows.shape[1] != expected:
            raise ValueError(
                f"inputs: expected {expected} of {self.length} rows of text, as Spread.inputs has "
                f"cut them, got {rows.shape[1]} (on {self.spread.group.name})"
            )
        self.padding = kwargs.pop("attention_mask", None)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return `attend`'s out."""
        return self.attend(q, k, v, scale)[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend from this rank's rows to all ranks'.

        Collective: every rank calls this.

        Returns
        -------
        out : (B, s_q, H, D_V)
        lse : (B, H, s_q)
        """
        self.calls += 1
        padding = None if self.padding is None else self.padding.bool()

        def sees(b: Tensor, _: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            before = kv_index <= q_index
            return before if padding is None else before & padding[b, kv_index]

        dtype = autocast_dtype(q)
        q, k, v = (cast(x, dtype) for x in (q, k, v))
        # Few rows on each rank: one large block is faster than P small ones.
        return self.spread.attend_to(
            "self-attention", q, k, v, scale=scale, mask=sees, schedule="gather",
            queries="sharded", keys="sharded",
        )  # fmt: skip


def positions(batch: dict[str, Any]) -> Tensor:
    """Return the positions of a batch's rows, from 0 up: (1, S)."""
    rows = batch.get("input_ids")
    rows = batch["inputs_embeds"] if rows is None else rows
    return torch.arange(rows.shape[1], device=rows.device)[None]
