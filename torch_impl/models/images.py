"""Images, cut over ranks along their axis, and which text may see which of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lvxattn.common.masks import MaskRule
from lvxattn.torch_impl.models.adapter import Adapter

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class Images(Adapter):
    """A model that sees images: each rank encodes its own.

    A rank without images encodes the first one all the same, and drops it: all ranks' towers take
    part in whatever goes over their parameters, such as FSDP's collectives.
    """

    def __init__(self, model: nn.Module, spread: "Spread") -> None:
        super().__init__(model, spread)
        self.images = 0  # of all ranks, in the batch that was cut last
        self.given = 0  # of this rank, to the forward that is under way
        self.S_KV = 0
        self.tiles = 1  # columns of the table for each image
        # (B, S_Q, columns), bool: which of all ranks' keys, in columns of equal width, the text
        # may attend to
        self.table: Tensor | None = None

    @property
    def mine(self) -> range:
        """The images that are this rank's."""
        return self.spread.share(self.images)

    @property
    def encoded(self) -> slice:
        """The images that this rank encodes."""
        return self.encoded_of(self.images)

    def encoded_of(self, images: int) -> slice:
        """Return which of so many images this rank encodes."""
        mine = self.spread.share(images)
        start = mine.start if mine else 0
        return slice(start, start + max(1, len(mine)))

    def cut_images(self, batch: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Return the batch with this rank's images: axis 1 of the named tensors."""
        images = {batch[name].shape[1] for name in names if batch.get(name) is not None}
        if len(images) != 1 or 0 in images:
            raise ValueError(
                f"inputs: expected one number of images, from 1 up, in {', '.join(names)}, "
                f"got {sorted(images) or None}"
            )
        (self.images,) = images
        cut = {name: batch[name][:, self.encoded] for name in names if batch.get(name) is not None}
        return {**batch, **cut}

    def own(self, s_kv: int) -> int:
        """Return the number of this rank's keys."""
        encoded = self.encoded.stop - self.encoded.start
        # Another number of images than was cut: their keys would be taken for others'.
        if self.given != encoded:
            raise ValueError(
                f"inputs: expected {encoded} images, as Spread.inputs has cut them, "
                f"got {self.given}"
            )
        of_an_image = s_kv // encoded
        self.S_KV = of_an_image * self.images
        return len(self.mine) * of_an_image

    def own_rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the text: of axis 1."""
        if self.spread.text == "replicated":
            return x
        rows = self.spread.share(x.shape[1])
        return x[:, rows.start : rows.stop]

    def mask(self) -> MaskRule | None:
        """Return the rule that looks keys up in the table."""
        if self.table is None:
            return None
        table, columns = self.table, self.table.shape[2]
        if columns != self.images * self.tiles or self.S_KV % columns:
            raise ValueError(
                f"mask: expected columns for {self.images} images, which divide {self.S_KV} keys, "
                f"got {columns}, {self.tiles} for each image"
            )
        width = self.S_KV // columns

        def sees(b: Tensor, _: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            seen: Tensor = table[b, q_index, kv_index // width]
            return seen

        return sees
