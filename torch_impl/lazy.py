"""What takes seconds to import is imported when it is there already or is needed."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that ``torch.compile`` calls as it is.

    ``torch.compiler.disable`` is this, and imports the compiler for all who never compile.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call


def is_dtensor(x: Any) -> bool:
    """Tell a DTensor; where nobody has imported them, there is none."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor; any other tensor is its own."""
    part: Tensor = cast(Any, x).to_local() if is_dtensor(x) else x
    return part
