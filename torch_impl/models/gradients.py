"""Functions that are the identity, and act in the backward."""

from typing import Any

import torch
from torch import Tensor


class OfForward(torch.autograd.Function):
    """The identity, which saves its forward's number: as the shape of a tensor without elements.

    Gradient checkpointing calls layers again in the backward.  After another forward they would
    attend by its masks; but PyTorch compares the shapes of what is saved, and raises.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        """Return x."""
        ctx.save_for_backward(x.new_empty(0, number))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        _ = ctx.saved_tensors  # has a checkpoint compare
        return dx, None


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
