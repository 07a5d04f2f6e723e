"""Images, cut over ranks along their axis, and which text may see which of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lvxattn.common.masks import MaskRule
from lvxattn.torch_impl.models.spread import Adapter

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class Images(Adapter):
    """A model that sees images: each rank encodes its own.

    A rank without images encodes the first one all the same, and drops it: all ranks' towers take
    part in whatever goes over their parameters, such as FSDP's collectives.
    """

    def __init__(self, model: nn.Module, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.mine = range(0)
        self.encoded = slice(0)
        self.keys = 0  # of an image

    def cut_images(self, batch: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Return the batch with this rank's images: axis 1 of the named tensors."""
        images = {batch[name].shape[1] for name in names if batch.get(name) is not None}
        if len(images) != 1:
            raise ValueError(
                f"inputs: expected one number of images in {', '.join(names)}, "
                f"got {sorted(images) or None} (on {self.spread.group.name})"
            )
        self.mine = self.spread.share(*images)
        start = self.mine.start if self.mine else 0
        self.encoded = slice(start, start + max(1, len(self.mine)))
        cut = {name: batch[name][:, self.encoded] for name in names if batch.get(name) is not None}
        return {**batch, **cut}

    def own(self, s_kv: int) -> int:
        """Return the number of this rank's keys; note how many an image has."""
        encoded = self.encoded.stop - self.encoded.start
        self.keys, rest = divmod(s_kv, encoded)
        if rest:
            raise ValueError(
                f"inputs: expected keys of {encoded} images, as Spread.inputs has cut them, got "
                f"{s_kv} keys (on {self.spread.group.name})"
            )
        return len(self.mine) * self.keys

    def rule(self, table: Tensor, per_image: int = 1) -> MaskRule:
        """Return the rule of a table.

        Parameters
        ----------
        table : (B, s_q, images x per_image), bool
            For all ranks' images: True where the text may attend.
        """

        def sees(b: Tensor, _: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            seen: Tensor = table[b, q_index, kv_index // (self.keys // per_image)]
            return seen

        return sees
