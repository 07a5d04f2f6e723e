"""Who attends to a block: `cuda`, the kernels in CUDA C++, or `tiles`, matrix products for any.

    LVXATTN_KERNEL = cuda | tiles   ->  that; an error where `cuda` cannot
    unset or auto                   ->  cuda where it can, and tiles elsewhere

The argument `kernel` of `block_attention`, where it is not ``"auto"``, comes before the variable.
What cannot be compiled here is said once, as a warning, before the tiles take over.
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
# The third axis of a grid.
MOST_PAIRS = 65535


class Choice(NamedTuple):
    """``"cuda"`` or ``"tiles"``, and why."""

    kernel: str
    why: str

    def __str__(self) -> str:
        """Return both."""
        return f"{self.kernel}: {self.why}"


def wish(kernel: str = "auto") -> tuple[str, str]:
    """Return which kernel is wished for, and what says so.

    Parameters
    ----------
    kernel : str
        The argument; ``"auto"`` asks ``LVXATTN_KERNEL``, which is ``auto`` unless it is set.

    Raises
    ------
    ValueError
        It is none of auto, cuda and tiles.
    """
    by = "kernel"
    if kernel == "auto":
        by, kernel = _VARIABLE, os.environ.get(_VARIABLE) or "auto"
    if kernel not in _WISHES:
        raise ValueError(f"{by}: expected auto, cuda or tiles, got {kernel!r}")
    return kernel, by


def choose(q: Array, k: Array, v: Array, mask: Any, kernel: str = "auto") -> Choice:
    """Choose who attends to a block.  Not collective; compiles once for each dtype and D.

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
        There is no such kernel, or `cuda` is wished for and does not take such a block.
    RuntimeError
        `cuda` is wished for, and cannot be compiled.
    """
    kernel, by = wish(kernel)
    if kernel == "tiles":
        return Choice("tiles", f"{by}=tiles")
    if array_module(q) is np and by == _VARIABLE:  # which is about CuPy's
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
    """Say what keeps the CUDA kernels from a block that has queries and keys, or None.

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


@cache  # once in a process, whatever its filters say
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
