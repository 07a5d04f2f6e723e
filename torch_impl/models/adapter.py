"""What a kind of model needs to be spread: written once for each kind."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lvxattn.common.masks import MaskRule

if TYPE_CHECKING:
    from lvxattn.torch_impl.models.spread import Spread


class Adapter:
    """What a kind of model needs to be spread: how its input is cut, and its masks.

    Its hooks only note what a forward is given.  `own` and `mask` check it, where all ranks raise
    together.

    Parameters
    ----------
    model : Module
    spread : Spread

    Attributes
    ----------
    texts : tuple of str
        The values of `text` that this kind of model supports.
    """

    texts: tuple[str, ...] = ("replicated",)

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
        """Return the mask of the forward that is under way; called after `own`.

        Raises
        ------
        ValueError
            The model was given a mask that is not supported.
        """
        raise NotImplementedError
