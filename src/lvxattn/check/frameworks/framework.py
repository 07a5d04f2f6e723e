"""What the check needs of a library of arrays."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lvxattn.common.masks import MaskRule

Array = npt.NDArray[Any]
Function = Callable[[Any, Any, Any], Any]
Pullback = Callable[[Any], tuple[Any, Any, Any]]

DTYPES = ("float64", "float32", "float16", "bfloat16")


class Framework(Protocol):
    """A library of arrays, on one device; `Any` is an array of its."""

    @property
    def name(self) -> str:
        """Of the library, as users write it: ``"numpy"``."""

    @property
    def device(self) -> str:
        """Where its arrays are."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Which of float64, float32, float16 and bfloat16 it has here."""

    @property
    def missing(self) -> dict[str, str]:
        """Why it has not the others, by name."""

    @property
    def usual(self) -> tuple[str, ...]:
        """Those that the quick suite takes, as far as they are there."""

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which a thread works on the device, and as the library was set."""

    @property
    def autograd(self) -> bool:
        """Whether it differentiates functions by itself."""

    def put(self, x: Array, memory: str = "contiguous") -> Any:
        """Return a copy of a NumPy array.

        Parameters
        ----------
        x : array
            bfloat16 is ml_dtypes'.
        memory : str
            How it is to lie in memory, as far as the library can: ``"contiguous"``;
            ``"transposed"``, its last two axes the other way round; ``"broadcast"``, its second
            axis, over which it is the same, of stride 0; ``"read-only"``.
        """

    def rule(self, mask: MaskRule) -> MaskRule:
        """Return a callable mask in the form in which the library passes functions around."""

    def get(self, x: Any) -> Array:
        """Return a copy in NumPy: of floating numbers in float64, of bool in bool."""

    def owns(self, x: Any) -> bool:
        """Whether x is an array of this library, on the device."""

    def differentiate(self, fn: Function, q: Any, k: Any, v: Any) -> tuple[Any, Pullback | str]:
        """Return what ``fn(q, k, v)`` returns, and what makes dq, dk and dv of dout by autograd.

        Instead of the latter, why there is no gradient: the library has no autograd, or fn cannot
        be differentiated.
        """


def half_missing() -> dict[str, str]:
    """Return why bfloat16 is not there, if it is not: NumPy, which draws, has it from ml_dtypes."""
    if find_spec("ml_dtypes"):
        return {}
    return {"bfloat16": "it needs ml_dtypes: pip install ml_dtypes"}


def there(names: tuple[str, ...], missing: dict[str, str]) -> tuple[str, ...]:
    """Return those names of dtypes that are not missing."""
    return tuple(name for name in names if name not in missing)


def device_number(device: str | int | None, library: str) -> int:
    """Return the number of a CUDA device: of ``1``, ``"1"``, ``"cuda:1"``; 0 unless given.

    Raises
    ------
    ValueError
    """
    text = "0" if device in (None, "cuda", "gpu") else str(device)
    number = text.removeprefix("cuda:").removeprefix("gpu:")
    if not number.isdecimal():
        raise ValueError(
            f"device: expected a number or cuda:NUMBER with {library}, got {device!r:.40}"
        )
    return int(number)


def laid_out(x: Array, memory: str) -> Array:
    """Return a copy of a NumPy array that lies in memory as `Framework.put` describes."""
    if memory == "transposed" and x.ndim == 4:
        return np.array(x.swapaxes(-1, -2), order="C", copy=True).swapaxes(-1, -2)
    if memory == "broadcast" and same_over_heads(x):
        one = np.array(x[:, :1], order="C", copy=True)
        return np.lib.stride_tricks.as_strided(one, x.shape, _stride_0(one))
    x = np.array(x, order="C", copy=True)
    x.flags.writeable = memory != "read-only"
    return x


def same_over_heads(x: Array) -> bool:
    """Whether an array can have stride 0 along its second axis."""
    return x.ndim == 4 and x.shape[1] > 1 and bool((x == x[:, :1]).all())


def _stride_0(one: Array) -> tuple[int, ...]:
    strides = list(one.strides)
    strides[1] = 0
    return tuple(strides)
