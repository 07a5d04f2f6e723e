"""The choice of a kernel: `cuda`, the kernels in CUDA C++, or `tiles`, matrix products.

    LVXATTN_KERNEL = cuda | tiles   ->  that one; an error where cuda does not support the block
    unset or auto                   ->  cuda where it supports the block, else tiles

The argument `kernel` of `block_attention`, unless ``"auto"``, overrides the variable.  If the
kernels cannot be compiled, this is reported once, by a warning, and tiles are used.
"""

import os
import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from lvxattn.common.validation import dtype_name
from lvxattn.mpi_impl.kernels import cuda
from lvxattn.mpi_impl.kernels.build import HEAD_DIMS, SCALARS, tiles_of
from lvxattn.mpi_impl.transport.device import array_module, in_a_line

Array = Any  # NumPy or CuPy

_VARIABLE = "LVXATTN_KERNEL"
_WISHES = "auto", "cuda", "tiles"
# The limit of the third axis of a grid.
MOST_PAIRS = 65535


class Choice(NamedTuple):
    """``"cuda"`` or ``"tiles"``, and why."""

    kernel: str
    why: str

    def __str__(self) -> str:
        """Return the kernel and the reason."""
        return f"{self.kernel}: {self.why}"


def wish(kernel: str = "auto") -> tuple[str, str]:
    """Return the requested kernel, and the name of the argument or variable that requests it.

    Parameters
    ----------
    kernel : str
        The argument; with ``"auto"``, ``LVXATTN_KERNEL`` decides, if it is set.

    Raises
    ------
    ValueError
        It is not one of auto, cuda and tiles.
    """
    by = "kernel"
    if kernel == "auto":
        by, kernel = _VARIABLE, os.environ.get(_VARIABLE) or "auto"
    if kernel not in _WISHES:
        raise ValueError(f"{by}: expected auto, cuda or tiles, got {kernel!r}")
    return kernel, by


def choose(q: Array, k: Array, v: Array, mask: Any, kernel: str = "auto") -> Choice:
    """Choose the kernel for a block.  Not collective; compiles once for each dtype and D.

    Parameters
    ----------
    q : (B, H, s_q, D)
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
    mask : None, array or callable
    kernel : str
        As `wish` takes it.

    Raises
    ------
    ValueError
        There is no such kernel, or `cuda` is requested and does not support the block.
    RuntimeError
        `cuda` is requested, and cannot be compiled.
    """
    kernel, by = wish(kernel)
    if kernel == "tiles":
        return Choice("tiles", f"{by}=tiles")
    if array_module(q) is np and by == _VARIABLE:  # which is for CuPy's arrays
        return Choice("tiles", "NumPy arrays")
    if q.size == 0 or k.size == 0:
        return Choice("tiles", "a block without queries or keys is no work")
    xp, dtype = array_module(q), dtype_name(q)
    reason = unsupported(xp, q, k, v, mask)
    if reason is not None:
        if kernel == "cuda":
            raise ValueError(f"{by}: 'cuda' expects {reason}")
        return Choice("tiles", f"cuda expects {reason}")
    error = cuda.failure(xp, dtype, q.shape[3])
    if error is not None:
        told = f"cannot be compiled ({in_a_line(error)})"
        if kernel == "cuda":
            raise RuntimeError(f"{by}: 'cuda' {told}") from error
        _warn(f"the CUDA kernels {told}: tiles compute instead; {_VARIABLE}=cuda shows all of it")
        return Choice("tiles", f"cuda {told}")
    return Choice(
        "cuda", f"{by}=cuda" if kernel == "cuda" else f"{dtype}, D = {q.shape[3]}, no mask"
    )


def unsupported(xp: Any, q: Array, k: Array, v: Array, mask: Any) -> str | None:
    """Return why the CUDA kernels do not support a block with queries and keys, or None.

    Returns
    -------
    reason : str or None
        ``"<what is expected>, got <what is given>"``.
    """
    if xp is np:
        return "a CuPy array, got one of numpy"
    dtype = dtype_name(q)
    if dtype not in SCALARS:
        return f"one of {', '.join(SCALARS)}, got {dtype}"
    D, D_V = q.shape[3], v.shape[3]
    if D not in HEAD_DIMS or D_V != D:
        return f"D = D_V in {HEAD_DIMS}, got D = {D}, D_V = {D_V}"
    if mask is not None:
        return f"no mask, got {type(mask).__name__}"
    if (pairs := k.shape[0] * k.shape[1]) > MOST_PAIRS:
        return f"B H_KV of at most {MOST_PAIRS}, got {pairs}"
    if {dtype_name(k), dtype_name(v)} != {dtype}:
        return f"k and v of q's {dtype}, got {dtype_name(k)} and {dtype_name(v)}"
    capability = int(xp.cuda.Device().compute_capability)
    if capability < 80:
        return f"a device of compute capability 8.0 or more, got {capability / 10}"
    most = max(tile.shared_bytes(dtype, D) for tile in tiles_of(dtype, D).values())
    here = cuda.device_facts(xp).shared_bytes
    if most > here:
        return f"a device with {most} bytes of shared memory a block, got {here}"
    return None


@cache  # once per process, for any warning filters
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
