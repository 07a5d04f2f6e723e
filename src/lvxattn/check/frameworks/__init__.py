"""Array libraries, for whose arrays the functions to be checked are written."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.cases import DTYPES
from lvxattn.common.masks import MaskRule

Array = npt.NDArray[Any]
Function = Callable[[Any, Any, Any], Any]
Pullback = Callable[[Any], tuple[Any, Any, Any]]

_CLASSES = {"numpy": "NumPy", "torch": "Torch", "jax": "Jax", "cupy": "CuPy"}
NAMES = tuple(_CLASSES)


class Framework(ABC):
    """An array library on one device; `Any` is one of its arrays.

    Attributes
    ----------
    name : str
        As users write it: ``"numpy"``.
    autograd : bool
        Whether the library differentiates functions.
    usual : tuple of str
        The quick suite's dtypes, as far as they are available.
    device : str
    chosen : tuple of str, optional
        The dtypes of a check, which calls functions with no others; default: all available ones.
    missing : dict
        Why each other dtype is unavailable, by name.
    environment : dict
        Variables with which the library is the same in another process.
    preload : str
        The library, if it can be imported before a fork.
    """

    name: str
    autograd: bool
    usual: tuple[str, ...] = ("float32", "bfloat16")
    device: str
    missing: dict[str, str]
    chosen: tuple[str, ...] | None = None
    environment: Mapping[str, str] = {}
    preload: str = ""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The available ones of float64, float32, float16 and bfloat16."""
        return tuple(name for name in DTYPES if name not in self.missing)

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which a thread uses the device and the library's settings."""
        return nullcontext()

    def put(self, x: Array, memory: str = "contiguous") -> Any:
        """Return a copy of a NumPy array.

        Parameters
        ----------
        x : array
            bfloat16 is ml_dtypes'.
        memory : str
            The copy's layout, as far as the library allows: ``"contiguous"``; ``"transposed"``, its
            last two axes swapped in memory; ``"sequence-major"``, its second and third;
            ``"broadcast"``, stride 0 along its second axis, if x is constant there; ``"cache"``, a
            part of a longer array along its third axis; ``"read-only"``.
        """
        if memory == "transposed" and x.ndim == 4:
            return self._dense(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        if memory == "sequence-major" and x.ndim == 4:
            return self._dense(x.swapaxes(1, 2)).swapaxes(1, 2)
        if memory == "broadcast" and x.ndim == 4 and x.shape[1] > 1 and (x == x[:, :1]).all():
            return self._repeat(self._dense(x[:, :1]), x.shape)
        if memory == "cache" and x.ndim == 4:
            longer = np.full((*x.shape[:2], x.shape[2] + 8, x.shape[3]), np.nan).astype(x.dtype)
            longer[:, :, 3:-5] = x
            return self._dense(longer)[:, :, 3:-5]
        return self._dense(x)

    @abstractmethod
    def _dense(self, x: Array) -> Any:
        """Return a contiguous copy of a NumPy array."""

    def _repeat(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return x, whose second axis is 1, broadcast with stride 0."""
        raise NotImplementedError

    def rule(self, mask: MaskRule) -> MaskRule:
        """Return a callable mask in the form in which the library accepts functions."""
        return mask

    @abstractmethod
    def get(self, x: Any) -> Array:
        """Return a NumPy copy: of floating-point numbers in float64, of bool in bool."""

    @abstractmethod
    def owns(self, x: Any) -> bool:
        """Whether x is an array of this library, on the device."""

    def differentiate(self, fn: Function, q: Any, k: Any, v: Any) -> tuple[Any, Pullback | str]:
        """Return ``fn(q, k, v)``, and a function that computes dq, dk and dv from dout by autograd.

        The latter is instead the reason why there is no gradient, if the library has no autograd or
        fn cannot be differentiated.
        """
        library = type(self).__name__
        return fn(q, k, v), f"{library} has no autograd, and the function no backward"


def framework_of(name: str | None, device: str | int | None = None) -> Framework:
    """Return the framework of a name, by default NumPy.

    Its library is imported here and not before.

    Parameters
    ----------
    name : str, optional
        ``"numpy"``, ``"torch"``, ``"jax"`` or ``"cupy"``.
    device : str or int, optional
        In the library's notation: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``1``; default: the CPU with
        NumPy and PyTorch, otherwise the library's default.

    Raises
    ------
    ValueError
        There is no such framework, or no such device.
    ModuleNotFoundError
        The library is not installed.
    """
    name = "numpy" if name is None else name
    if name not in NAMES:
        raise ValueError(f"framework: expected one of {', '.join(NAMES)}, got {name!r:.40}")
    try:
        module = import_module(f"lvxattn.check.frameworks.{name}_arrays")
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        cupy = "cupy-cuda12x, or cupy-cuda13x, as the driver's CUDA is"
        package = cupy if name == "cupy" else name
        raise ModuleNotFoundError(
            f"framework: {name} is not installed: pip install {package}", name=name
        ) from None
    framework: Framework = getattr(module, _CLASSES[name])(device)
    return framework


def half_missing() -> dict[str, str]:
    """Return why bfloat16 is unavailable, if so: the arrays are drawn in NumPy, by ml_dtypes."""
    if find_spec("ml_dtypes"):
        return {}
    return {"bfloat16": "it needs ml_dtypes: pip install ml_dtypes"}
