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
        self.encoded = slice(0, 0)
        self.keys = 0  # of an image
        # (B, s_q, images x per_image), bool: which of all ranks' images the text may attend to
        self.table: Tensor | None = None
        self.per_image = 1

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

    def check_images(self, images: int) -> None:
        """Refuse another number of images than was cut: their keys would be taken for others'."""
        encoded = self.encoded.stop - self.encoded.start
        if images != encoded:
            raise ValueError(
                f"inputs: expected {encoded} images, as Spread.inputs has cut them, got {images} "
                f"(on {self.spread.group.name})"
            )

    def own(self, s_kv: int) -> int:
        """Return the number of this rank's keys; note how many an image has."""
        self.keys = s_kv // (self.encoded.stop - self.encoded.start)
        return len(self.mine) * self.keys

    def mask(self) -> MaskRule | None:
        """Return the rule that looks keys up in the table."""
        if self.table is None:
            return None
        table, keys = self.table, self.keys // self.per_image

        def sees(b: Tensor, _: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            seen: Tensor = table[b, q_index, kv_index // keys]
            return seen

        return sees
