"""The model of `owl3`, whose images are spread over ranks."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lvxattn.torch_impl.models.images import Images
from lvxattn.torch_impl.models.spread import Make

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class SpreadOwl3(Images):
    """Every rank knows where all images are in the text, and rotates its own to their places."""

    def __init__(self, model: Any, spread: "Spread") -> None:
        super().__init__(model, spread)
        model.attend = self.attend

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether this is an Owl3."""
        return type(model).__name__ == "Owl3"

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut the images, and note where all of them are."""
        cut = self.cut_images(batch, ("pixel_values",))
        if cut.get("image_positions") is None:
            cut["image_positions"] = self.model.find_images(batch["input_ids"], self.images)
        self.model.given = self.encoded
        self.given = self.encoded.stop - self.encoded.start  # or the model raises
        return cut

    def attend(
        self, make: Make, q: Tensor, y: Tensor, table: Tensor, *, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend to all ranks' images."""
        self.table = table
        return self.spread.attend(make, q, y, recompute=recompute)
