"""Arrays of the library that a function to be checked is written for."""

from importlib import import_module

from lvxattn.check.frameworks.framework import DTYPES, Framework

NAMES = ("numpy", "torch", "jax", "cupy")

_CLASSES = {"numpy": "NumPy", "torch": "Torch", "jax": "Jax", "cupy": "CuPy"}
_INSTALL = {
    "torch": "pip install torch",
    "jax": "pip install jax",
    "cupy": "pip install cupy-cuda12x, or cupy-cuda13x, as the driver's CUDA is",
}


def framework_of(name: str | None, device: str | int | None = None) -> Framework:
    """Return the framework of a name, NumPy unless given.

    Its library is imported here and not before.

    Parameters
    ----------
    name : str, optional
        ``"numpy"``, ``"torch"``, ``"jax"`` or ``"cupy"``.
    device : str or int, optional
        As the library names it: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``1``.  Unless given, the CPU
        with NumPy and PyTorch, with the others where their arrays are by default.

    Raises
    ------
    ValueError
        No such framework, or no such device.
    ModuleNotFoundError
        It is not installed.
    """
    name = "numpy" if name is None else name
    if name not in NAMES:
        raise ValueError(f"framework: expected one of {', '.join(NAMES)}, got {name!r:.40}")
    try:
        module = import_module(f"lvxattn.check.frameworks.{name}_arrays")
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"framework: {name} is not installed: {_INSTALL[name]}", name=name
        ) from None
    framework: Framework = getattr(module, _CLASSES[name])(device)
    return framework


__all__ = ["DTYPES", "NAMES", "Framework", "framework_of"]
