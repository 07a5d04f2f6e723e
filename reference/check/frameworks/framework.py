"""What the check needs of a library of arrays."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Framework(Protocol):
    """A library of arrays, on one device; `Any` is an array of its."""

    @property
    def name(self) -> str:
        """Of the library, as users write it: ``"numpy"``."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Which of float64, float32, float16 and bfloat16 it has here."""

    @property
    def usual(self) -> tuple[str, ...]:
        """Those that the quick suite takes."""

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

    def get(self, x: Any) -> Array:
        """Return a copy in NumPy: of floating numbers in float64, of bool in bool."""

    def owns(self, x: Any) -> bool:
        """Whether x is an array of this library."""

    def differentiate(
        self, fn: Callable[[Any, Any, Any], Any], q: Any, k: Any, v: Any, dout: Any
    ) -> tuple[Any, tuple[Any, Any, Any] | None]:
        """Return what ``fn(q, k, v)`` returns, and dq, dk and dv for dout by autograd.

        None stands for the gradients where the library has no autograd or fn cannot be
        differentiated.
        """


def laid_out(x: Array, memory: str) -> Array:
    """Return a copy of a NumPy array that lies in memory as `Framework.put` describes."""
    if memory == "transposed" and x.ndim == 4:
        return np.array(x.swapaxes(-1, -2), order="C", copy=True).swapaxes(-1, -2)
    if memory == "broadcast" and x.ndim == 4 and x.shape[1] > 1 and (x == x[:, :1]).all():
        one = np.array(x[:, :1], order="C", copy=True)
        return np.lib.stride_tricks.as_strided(one, x.shape, _stride_0(one))
    x = np.array(x, order="C", copy=True)
    x.flags.writeable = memory != "read-only"
    return x


def _stride_0(one: Array) -> tuple[int, ...]:
    strides = list(one.strides)
    strides[1] = 0
    return tuple(strides)
