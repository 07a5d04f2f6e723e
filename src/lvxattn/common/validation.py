"""Validate arguments by their shapes and dtypes alone, for arrays of every library.

Every error names the argument, what was expected and what was given; callers that know the rank add
it.  `raise_together` raises an error of one rank on all of them, so that no rank waits for a
message that will never come.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib import import_module
from math import isfinite
from numbers import Real
from typing import Any, Protocol, TypeVar

Array = Any
T = TypeVar("T")
Forms = tuple[tuple[tuple[int, ...], str], ...]

FLOATING = ("float16", "bfloat16", "float32", "float64")
# A subclass of one of their arrays belongs to the same library.
LIBRARIES = ("numpy", "cupy", "torch")


class Communicator(Protocol):
    """The part of a communicator that the checks use, with mpi4py's names."""

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def allgather(self, sendobj: T) -> list[T]:
        """Return on every rank the objects of all ranks, in rank order."""


def check_attention(q: Array, k: Array, v: Array, *, scale: float | None, mask: Any) -> None:
    """Check the arguments of one rank, or of a single process.

    Raises
    ------
    TypeError
        An argument is not an array, or of another library or dtype than q, or of a dtype that is
        not floating.
    ValueError
        The shapes do not match.
    """
    for name, x, axes in (
        ("q", q, "(B, H, s_q, D)"),
        ("k", k, "(B, H_KV, s_kv, D)"),
        ("v", v, "(B, H_KV, s_kv, D_V)"),
    ):
        _check_array(name, x, q)
        _check_floating(name, x)
        if len(x.shape) != 4:
            raise ValueError(f"{name}: expected 4 axes {axes}, got shape {tuple(x.shape)}")
        if 0 in (x.shape[0], x.shape[1], x.shape[3]):
            raise ValueError(
                f"{name}: expected every axis of {axes} but the length to be at least 1, "
                f"got shape {tuple(x.shape)}"
            )
        if dtype_name(x) != dtype_name(q):
            raise TypeError(f"{name}: expected q's dtype {dtype_name(q)}, got {dtype_name(x)}")
    B, H, _, D = q.shape
    H_KV, s_kv = k.shape[1:3]
    for name, x, axis, symbol, size, other in (
        ("k", k, 0, "B", B, "q"),
        ("k", k, 3, "D", D, "q"),
        ("v", v, 0, "B", B, "q"),
        ("v", v, 1, "H_KV", H_KV, "k"),
        ("v", v, 2, "s_kv", s_kv, "k"),
    ):
        if x.shape[axis] != size:
            raise ValueError(
                f"{name}: expected {symbol} = {size} on axis {axis} as in {other}, "
                f"got shape {tuple(x.shape)}"
            )
    if H % H_KV:
        raise ValueError(
            f"k: expected H_KV to divide q's H = {H}, got H_KV = {H_KV} in shape {tuple(k.shape)}"
        )
    check_scale(scale)
    check_mask(mask, q, s_kv)


def check_numpy(x: Array, name: str = "q") -> None:
    """Raise TypeError for an array of another library."""
    if is_array(x) and library(x) != "numpy":
        raise TypeError(f"{name}: expected a NumPy array, got {type(x).__name__} of {library(x)}")


def check_communicator(comm: Any) -> None:
    """Raise TypeError, on this rank alone, if comm is not a communicator."""
    if not hasattr(comm, "allgather") or not hasattr(comm, "rank"):
        raise TypeError(f"comm: expected a communicator, got {instead_of(comm)}")


def instead_of(x: Any) -> str:
    """Describe what was given as comm; a hint for masks, which users pass as fourth argument."""
    if is_array(x):
        return f"{type(x).__name__} of shape {tuple(x.shape)}; a mask is given as mask="
    if isinstance(x, type) or not callable(x):
        return type(x).__name__
    return f"{type(x).__name__} {getattr(x, '__name__', '')}; a mask is given as mask="


def check_scale(scale: float | None) -> None:
    """Check that `scale` is None or a finite real number."""
    if scale is None:
        return
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale: expected a real number or None, got {_kind(scale)}")
    try:
        finite = isfinite(scale)
    except OverflowError:  # an int that no float can hold
        finite = False
    if not finite:
        raise ValueError(f"scale: expected a finite number, got {scale!r:.40}")


def check_mask(mask: Any, q: Array, s_kv: int) -> None:
    """Check a mask against B and H of this rank's queries, and against its keys."""
    if mask is None or callable(mask):
        return
    _check_array("mask", mask, q)
    if dtype_name(mask) != "bool" and dtype_name(mask) not in FLOATING:
        raise TypeError(
            "mask: expected bool (True = may attend) or an additive floating dtype, "
            f"got {dtype_name(mask)}"
        )
    shape = tuple(mask.shape)
    B, H = q.shape[:2]
    four = (1,) * (4 - len(shape)) + shape
    if not 1 <= len(shape) <= 4 or four[0] not in (1, B) or four[1] not in (1, H):
        raise ValueError(
            f"mask: expected a shape that broadcasts to (B, H, S_Q, s_kv) = ({B}, {H}, S_Q, {s_kv})"
            f", got {shape}"
        )
    if four[3] != s_kv:
        raise ValueError(
            f"mask: expected its last axis to be exactly the keys, s_kv = {s_kv}, got {shape}"
        )


def check_mask_rows(mask: Any, S_Q: int) -> None:
    """Check the query axis of an array mask: 1, or all ranks' queries."""
    if mask is not None and not callable(mask):
        check_mask_shape_rows(tuple(mask.shape), S_Q)


def check_mask_shape_rows(shape: tuple[int, ...], S_Q: int) -> None:
    """Check the query axis of an array mask of this shape."""
    if len(shape) > 1 and shape[-2] not in (1, S_Q):
        raise ValueError(
            f"mask: expected its query axis to be 1 or all queries, S_Q = {S_Q}, got {shape}"
        )


def check_backward(
    q: Array, v: Array, dout: Array, out: Array, lse: Array, dlse: Array | None
) -> None:
    """Check the arguments of the backward that the forward does not have."""
    rows = tuple(q.shape[:3])
    given: dict[str, Any] = {"dout": dout, "out": out, "lse": lse, "dlse": dlse}
    for name, x in given.items():
        if name == "dlse" and x is None:
            continue
        axes, shape = "(B, H, s_q)", rows
        if name.endswith("out"):
            axes, shape = "(B, H, s_q, D_V)", (*rows, v.shape[3])
        _check_array(name, x, q)
        _check_floating(name, x)
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {axes} = {shape}, got {tuple(x.shape)}")


def check_here_or_together(
    check: Callable[[], None], comm: Communicator, *, together: bool
) -> None:
    """Run a check, and add the rank to its error.

    Collective where `together`: then the error is raised on every rank, else on this one only.
    """
    error: Exception | None = None
    try:
        check()
    except (TypeError, ValueError, RuntimeError) as e:
        error = e
    cause = error and error.__cause__  # which is not sent
    if together:
        try:
            raise_together(error, comm)
        except Exception as said:
            raise said from cause
    elif error is not None:
        raise on_rank(error, comm.rank, comm.size) from cause


def attempt(make: Callable[[], Any], comm: Communicator, *, together: bool) -> Any:
    """Return the result of `make` or, where ranks raise together, its exception."""
    if not together or comm.size == 1:
        return make()
    try:
        return make()
    except Exception as error:
        return error


def check_made(
    make_kv: Any,
    made: Any,
    q: Array,
    before: Forms | None = None,
    also: Callable[[Array, Array, Array], None] | None = None,
) -> None:
    """Check that `make_kv` returned keys and values that fit this rank's queries.

    Parameters
    ----------
    made
        What it returned, or the exception that it raised.
    before : tuple, optional
        The `forms` of k and v in the forward.
    also : callable, optional
        Further checks of an implementation on q, k and v.

    Raises
    ------
    TypeError, ValueError
        Naming make_kv, what was expected and what was given.
    RuntimeError
        It raised an exception.
    """
    if isinstance(made, Exception):
        raise RuntimeError(
            f"make_kv: expected keys and values, got {type(made).__name__}: {made}"
        ) from made
    if not callable(make_kv):
        raise TypeError(f"make_kv: expected a callable, make_kv(y) -> (k, v), got {_kind(make_kv)}")
    if not isinstance(made, tuple | list) or len(made) != 2:
        got = f"{type(made).__name__}" + (f" of {len(made)}" if hasattr(made, "__len__") else "")
        raise TypeError(f"make_kv: expected it to return keys and values (k, v), got {got}")
    try:
        if also is not None:
            also(q, *made)
        check_attention(q, *made, scale=None, mask=None)
    except (TypeError, ValueError) as error:
        if str(error).startswith("q: "):
            raise
        raise type(error)(f"make_kv: {error}") from None
    if before is not None and forms(made) != before:
        raise ValueError(
            f"make_kv: expected k and v as it made them in the forward, {before}, got {forms(made)}"
        )


def forms(made: Iterable[Array]) -> Forms:
    """Return shape and dtype of each array."""
    return tuple((tuple(x.shape), dtype_name(x)) for x in made)


def check_seconds(name: str, text: str | None) -> float | None:
    """Return the seconds set by an environment variable; None if it is unset.

    Parameters
    ----------
    name : str
    text : str, optional
        The variable's value.

    Raises
    ------
    ValueError
        The value is not a number above 0.
    """
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not (seconds > 0 and isfinite(seconds)):
        raise ValueError(f"{name}: expected a number of seconds above 0, got {text!r:.40}")
    return min(seconds, 1e9)  # 31 years; no timer counts up to 1e300


def raise_together(error: Exception | None, comm: Communicator) -> None:
    """Raise on every rank the error of the lowest rank that has one.

    Collective: every rank of comm calls this, with its own error or None.
    """
    raise_lowest(comm.allgather(error))


def raise_lowest(errors: list[Exception | None]) -> None:
    """Raise the error of the lowest rank that has one, naming the rank."""
    for rank, error in enumerate(errors):
        if error is not None:
            raise on_rank(error, rank, len(errors)) from None


def on_rank(error: Exception, rank: int, size: int) -> Exception:
    """Return an error of the same type whose text also names the rank."""
    return type(error)(f"{error} (on rank {rank} of {size})")


def dtype_name(x: Array) -> str:
    """Return the name of an array's dtype, such as ``"bfloat16"``, for any library."""
    return _name(x.dtype)


@lru_cache(64)  # NumPy builds a name anew each time
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def accumulator(dtype: str) -> str:
    """Return the dtype in which numbers of a dtype are summed: fp32, or fp64 for fp64."""
    return "float64" if dtype == "float64" else "float32"


def _check_array(name: str, x: Any, like: Any) -> None:
    if not is_array(x):
        raise TypeError(f"{name}: expected an array, got {_kind(x)}")
    if type(x).__module__.startswith("numpy.ma"):
        raise TypeError(f"{name}: expected a plain array and mask=, got a masked array")
    if library(x) != library(like):
        raise TypeError(f"{name}: expected a {library(like)} array as q is, got {library(x)}")


def _check_floating(name: str, x: Array) -> None:
    if dtype_name(x) not in FLOATING:
        raise TypeError(f"{name}: expected one of {', '.join(FLOATING)}, got {dtype_name(x)}")


def is_array(x: Any) -> bool:
    """Return whether x is an array of any library."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def library(x: Any) -> str:
    """Return the library of an array, such as ``"numpy"``; a subclass has that of its base."""
    kind: Any = type(x)
    return _library(kind)


@lru_cache(64)
def _library(kind: Any) -> str:
    packages: list[str] = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((name for name in packages if name in LIBRARIES), packages[0])


def arange(x: Array) -> Callable[[int, int], Array]:
    """Return the ``arange(start, stop)`` of x's library, on its device."""
    make = import_module(library(x)).arange
    return partial(make, device=x.device) if library(x) == "torch" else make


def device_kind(x: Array) -> str:
    """Return the kind of x's device by PyTorch's name: ``"cpu"``, ``"cuda"``, ..."""
    if library(x) == "cupy":
        return "cuda"
    return str(getattr(getattr(x, "device", None), "type", "cpu"))


def _kind(x: Any) -> str:
    return f"{type(x).__name__} {x!r:.40}"
