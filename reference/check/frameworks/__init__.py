"""Arrays of the library that a function to be checked is written for."""

from typing import Any

from lvxattn.reference.check.frameworks.framework import Framework

NAMES = ("numpy", "torch", "jax", "cupy")


def framework_of(name: str | None, device: str | None = None) -> Framework:
    """Return the framework of a name, NumPy unless given.

    Parameters
    ----------
    name : str, optional
        ``"numpy"``, ``"torch"``, ``"jax"`` or ``"cupy"``.
    device : str, optional
        As PyTorch names it, such as ``"cuda:1"``; with the others a number or nothing.

    Raises
    ------
    ValueError
        No such framework, or no such device.
    ModuleNotFoundError
        It is not installed.
    """
    options: dict[str, Any] = {} if device is None else {"device": device}
    if name in (None, "numpy"):
        from lvxattn.reference.check.frameworks.numpy_arrays import NumPy

        return NumPy(**options)
    if name == "torch":
        from lvxattn.reference.check.frameworks.torch_arrays import Torch

        return Torch(**options)
    raise ValueError(f"framework: expected one of {', '.join(NAMES)}, got {name!r}")


__all__ = ["NAMES", "Framework", "framework_of"]
