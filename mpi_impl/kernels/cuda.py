"""The launches of the kernels: how work is divided among blocks of threads, and the arguments.

    q, dout, lse, delta   (B, H, s_q, ...)  ->  (B H_KV, G s_q, ...)   the same bytes, G = H / H_KV
    k, v, dk, dv          (B, H_KV, s_kv, D), of any strides: often some of a shard's keys

Kernels run in the current stream; nothing here waits for them.
"""

from functools import cache
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from lvxattn.common.validation import dtype_name
from lvxattn.mpi_impl.kernels.build import JOIN_WARPS, KERNELS, Tile, options, source, tiles_of

Array = Any  # CuPy

# Blocks of threads per multiprocessor in a launch, if there are enough keys.
BLOCKS_PER_PROCESSOR = 4
# The least steps in a split: it must write little compared with what it reads.
STEPS_PER_SPLIT = 4


def forward(xp: Any, q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Array]:
    """Return out (B, H, s_q, D) and lse (B, H, s_q) in fp32, for a supported block."""
    work = _Launches(xp, q, k)
    q, k, v = _packed(xp, q), _readable(xp, k), _readable(xp, v)
    splits, keys = work.splits("forward")
    out, lse = (
        xp.empty((splits, *q.shape), xp.float32),
        xp.empty((splits, *q.shape[:3]), xp.float32),
    )
    work.launch(
        "forward", (work.blocks("forward", work.rows), splits, work.pairs),
        (out, lse, q, k, v, *_strides(k), *_strides(v), *work.sizes, np.int32(keys), scale),
    )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    joined = xp.empty(q.shape, xp.float32), xp.empty(q.shape[:3], xp.float32)
    lines = lse[0].size
    work.launch(
        "merge_splits", (ceil(lines / JOIN_WARPS), 1, 1),
        (*joined, out, lse, np.int32(splits), np.int64(lines)),
    )  # fmt: skip
    return joined


def backward(
    xp: Any,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    dk: Array,
    dv: Array,
    *,
    scale: float,
    wanted: str = "qkv",
) -> Array:
    """Return dq in fp32, and add to dk and dv in place, which are in fp32 or q's dtype.

    What is not in `wanted`, as ``"q"`` or ``"kv"``, is not computed; dq is 0 then.
    """
    work = _Launches(xp, q, k)
    k, v = (_readable(xp, x) for x in (k, v))
    dout, q = (_packed(xp, x.astype(q.dtype, copy=False)) for x in (dout, q))
    lse, delta = (_packed(xp, x.astype(xp.float32, copy=False)) for x in (lse, delta))
    given = (dout, q, k, v, lse, delta, *_strides(k), *_strides(v))
    dq = _dq(work, given, scale) if "q" in wanted else xp.zeros(q.shape, xp.float32)
    if "k" in wanted:
        _add_dk_dv(work, given, dk, dv, scale)
    return dq


def _dq(work: "_Launches", given: tuple[Any, ...], scale: float) -> Array:
    """Return dq."""
    xp, q = work.xp, given[1]
    splits, keys = work.splits("backward_q")
    parts = xp.empty((splits, *q.shape), xp.float32)
    work.launch(
        "backward_q", (work.blocks("backward_q", work.rows), splits, work.pairs),
        (parts, *given, *work.sizes, np.int32(keys), scale),
    )  # fmt: skip
    dq = parts[0]
    if splits > 1:
        dq = xp.empty(q.shape, xp.float32)
        blocks = ceil(dq.size / (32 * JOIN_WARPS))
        work.launch("sum_splits", (blocks, 1, 1), (dq, parts, np.int32(splits), np.int64(dq.size)))
    return dq


def _add_dk_dv(
    work: "_Launches", given: tuple[Any, ...], dk: Array, dv: Array, scale: float
) -> None:
    """Add to dk and dv."""
    xp, q = work.xp, given[1]
    # The kernel writes pairs of numbers.  Views that these do not fit get its sums afterwards.
    names = {dtype_name(dk), dtype_name(dv)}
    fit = len(names) == 1 and names <= {"float32", dtype_name(q)} and _fits(dk) and _fits(dv)
    there = [dk, dv] if fit else [xp.zeros(x.shape, xp.float32) for x in (dk, dv)]
    wide = np.int32(dtype_name(there[0]) == "float32")
    work.launch(
        "backward_kv", (work.blocks("backward_kv", work.s_kv), 1, work.pairs),
        (*there, *given, *_strides(there[0]), *_strides(there[1]), *work.sizes, wide, scale),
    )  # fmt: skip
    for x, share in zip((dk, dv), there, strict=True):
        if share is not x:
            share += x.astype(xp.float32, copy=False)
            x[...] = share


def failure(xp: Any, dtype: str, D: int) -> Exception | None:
    """Compile for the current device, once, and return the error, or None."""
    return _failure(xp, dtype, D, xp.cuda.Device().id)


def forget() -> None:
    """Clear the caches of compiled kernels and of device properties."""
    for known in (_facts, _built, _failure):
        known.cache_clear()


def splits_of(tile: Tile, pairs: int, rows: int, s_kv: int, processors: int) -> tuple[int, int]:
    """Return the number of splits of the keys, and the largest number of keys in a split.

    Both depend on sizes and device only, so that the same call gives the same bits.
    """
    blocks, steps = ceil(rows / tile.rows) * pairs, ceil(s_kv / tile.cols)
    wanted = max(1, BLOCKS_PER_PROCESSOR * processors // blocks)
    each = max(ceil(steps / wanted), min(STEPS_PER_SPLIT, steps))
    return ceil(steps / each), each * tile.cols


class _Launches:
    """The kernels for one dtype and D, and the division of one block."""

    def __init__(self, xp: Any, q: Array, k: Array) -> None:
        self.xp = xp
        B, H, s_q, self.D = q.shape
        self.H_KV, self.s_kv = k.shape[1:3]
        self.dtype, self.pairs, self.rows = dtype_name(q), B * self.H_KV, H // self.H_KV * s_q
        self.tiles, self.device = tiles_of(self.dtype, self.D), device_facts(xp)
        self.kernels = _built(xp, self.dtype, self.D, self.device.id)
        self.sizes = tuple(np.int32(n) for n in (self.H_KV, self.rows, self.s_kv))

    def blocks(self, name: str, lines: int) -> int:
        """Return the number of blocks for the rows of queries, or the keys, of a pair."""
        return ceil(lines / self.tiles[name].rows)

    def splits(self, name: str) -> tuple[int, int]:
        """Return the number of splits of the keys, and the largest number of keys in a split."""
        device = self.device
        return splits_of(self.tiles[name], self.pairs, self.rows, self.s_kv, device.processors)

    def launch(self, name: str, grid: tuple[int, int, int], given: tuple[Any, ...]) -> None:
        """Launch a kernel in the current stream."""
        tile = self.tiles.get(name)
        warps = JOIN_WARPS if tile is None else tile.warps
        shared = 0 if tile is None else tile.shared_bytes(self.dtype, self.D)
        args = tuple(np.float32(x) if isinstance(x, float) else x for x in given)
        self.kernels[name](grid, (32 * warps, 1, 1), args, shared_mem=shared)


class DeviceFacts(NamedTuple):
    """Properties of a device: number, shared memory of a block in bytes, multiprocessors."""

    id: int
    shared_bytes: int
    processors: int


def device_facts(xp: Any) -> DeviceFacts:
    """Return the properties of the current device."""
    return _facts(xp, xp.cuda.Device().id)


@cache
def _facts(xp: Any, device: int) -> DeviceFacts:
    # cudaDevAttrMaxSharedMemoryPerBlockOptin and cudaDevAttrMultiProcessorCount
    numbers = (int(xp.cuda.runtime.deviceGetAttribute(which, device)) for which in (97, 16))
    return DeviceFacts(device, *numbers)


@cache  # as CuPy reads and hashes the source at every call
def _built(xp: Any, dtype: str, D: int, device: int) -> dict[str, Any]:
    """Compile for a device, and reserve shared memory for each kernel."""
    with xp.cuda.Device(device):
        module = xp.RawModule(code=source(), options=options(dtype, D))
        kernels = {name: module.get_function(name) for name in KERNELS}
        for name, tile in tiles_of(dtype, D).items():
            # More than 48 KB must be requested.
            kernels[name].max_dynamic_shared_size_bytes = tile.shared_bytes(dtype, D)
    return kernels


@cache  # so that a missing compiler is looked for once
def _failure(xp: Any, dtype: str, D: int, device: int) -> Exception | None:
    try:
        _built(xp, dtype, D, device)
    except Exception as error:  # CuPy's CompileException is not a RuntimeError
        return error.with_traceback(None)
    return None


def _fits(x: Array) -> bool:
    """Return whether rows are contiguous, and aligned to 16 bytes."""
    *outer, last = x.strides
    address = x.__cuda_array_interface__["data"][0]
    return last == x.itemsize and not any(n % 16 for n in (*outer, address))


def _readable(xp: Any, x: Array) -> Array:
    """Return x, or a copy whose rows are contiguous and aligned to 16 bytes."""
    return x if _fits(x) else _copy(xp, x)


def _packed(xp: Any, x: Array) -> Array:
    """Return x, or a copy that is contiguous and aligned to 16 bytes."""
    interface = x.__cuda_array_interface__
    packed = interface.get("strides") is None and interface["data"][0] % 16 == 0
    return x if packed else _copy(xp, x)


def _copy(xp: Any, x: Array) -> Array:
    y = xp.empty(x.shape, x.dtype)
    y[...] = x
    return y


def _strides(x: Array) -> tuple[Any, ...]:
    """Return the strides of batch entries, heads and rows, in numbers."""
    return tuple(np.int64(n // x.itemsize) for n in x.strides[:3])
