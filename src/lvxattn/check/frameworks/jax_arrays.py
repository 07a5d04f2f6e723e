"""JAX: autograd by `jax.vjp`; float64 only where jax_enable_x64 is on.

Its arrays have no strides and cannot be written into, but can be donated to a jitted function
(donate_argnums).  float64 and the default device may be settings of one thread alone: `Jax` keeps
those of the thread that makes it, and `Jax.active` applies them to another.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

import jax
import numpy as np

from lvxattn.check.error_location import one_line
from lvxattn.check.frameworks import Array, Framework, Function, Pullback, half_missing
from lvxattn.common.masks import MaskRule

# In JAX's ValueError for functions that have a value but no reverse-mode gradient.
_NO_GRADIENT = ("Reverse-mode differentiation", "not support JVP")


class Jax(Framework):
    """JAX's arrays on one device."""

    name = "jax"
    autograd = True

    def __init__(self, device: str | int | None = None) -> None:
        self._device = _device(device)
        self.device = str(self._device)
        self._x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        off = {} if self._x64 else {"float64": "jax_enable_x64 is off"}
        self.missing = off | half_missing()
        # Another process finds what this one has left of a GPU's memory.
        self.environment = {
            "JAX_ENABLE_X64": str(int(self._x64)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Apply the settings of the thread that made this to another."""
        with _enable_x64(self._x64), jax.default_device(self._device):
            yield

    def put(self, x: Array, memory: str = "contiguous") -> Any:  # noqa: ARG002
        """Copy an array; JAX decides on the layout."""
        return self._dense(x)

    def _dense(self, x: Array) -> Any:
        return jax.device_put(np.array(x, order="C", copy=True), self._device)

    def rule(self, mask: MaskRule) -> Any:
        """Return the mask as a valid argument of a jitted function."""
        partial: Any = jax.tree_util.Partial
        return partial(mask)

    def get(self, x: Any) -> Array:
        """Copy an array into float64."""
        x = np.asarray(x)
        return np.array(x, bool if x.dtype == bool else np.float64)

    def owns(self, x: Any) -> bool:
        """Whether x is an array on the device, and not an escaped tracer."""
        return (
            isinstance(x, jax.Array)
            and not isinstance(x, jax.core.Tracer)
            and x.devices() == {self._device}
        )

    def differentiate(self, fn: Function, q: Any, k: Any, v: Any) -> tuple[Any, Pullback | str]:
        """Call the function under `jax.vjp`, or without it if it cannot be differentiated."""

        def split(*leaves: Any) -> tuple[Any, Any]:
            result = fn(*leaves)
            pair = isinstance(result, tuple | list) and len(result) == 2
            out, *rest = result if pair else (result,)
            if not isinstance(out, jax.Array) or not all(isinstance(x, jax.Array) for x in rest):
                raise _NoArrayError
            return out, tuple(rest)

        why = ""
        try:
            out, transposed, rest = jax.vjp(split, q, k, v, has_aux=True)
        except _NoArrayError:
            why = "out is no array of JAX"
        except Exception as error:
            if not (_is_untraceable(error) or _has_no_gradient(error)):
                raise
            why = f"{type(error).__name__}: {one_line(error)}"
        if why:  # outside the handler: an error of fn here is not caused by that one
            return fn(q, k, v), why

        def pullback(dout: Any) -> tuple[Any, Any, Any]:
            try:
                dq, dk, dv = transposed(dout)
            except ValueError as error:  # a loop raises it only now
                if not _has_no_gradient(error):
                    raise
                raise NotImplementedError(str(error)) from error
            return dq, dk, dv

        return (out, *rest) if rest else out, pullback


class _NoArrayError(Exception):
    """A function returned something that cannot be differentiated."""


def _is_untraceable(error: Exception) -> bool:
    """Whether fn left JAX, usually for NumPy, or has a part without a derivative."""
    return isinstance(error, NotImplementedError | jax.errors.JAXTypeError)


def _has_no_gradient(error: Exception) -> bool:
    return isinstance(error, ValueError) and any(text in str(error) for text in _NO_GRADIENT)


def _device(device: str | int | None) -> Any:
    """Return JAX's device of a platform's name, of ``"cuda:1"``, or of a number."""
    if device is None:
        return jax.numpy.zeros(1).devices().pop()  # the default's
    platform, _, number = str(device).rpartition(":")
    if not number.isdecimal():
        platform, number = str(device), "0"
    try:
        return jax.devices(platform or None)[int(number)]
    except (RuntimeError, IndexError):
        found = ", ".join(f"{x.platform}:{x.id}" for x in jax.devices())
        raise ValueError(f"device: expected one of {found} with jax, got {device!r:.40}") from None


def _enable_x64(on: bool) -> AbstractContextManager[Any]:
    # Before JAX 0.8 it is experimental.
    module = jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")
    context: AbstractContextManager[Any] = module.enable_x64(on)
    return context
