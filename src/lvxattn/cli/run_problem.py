"""The problem of a run: tensors from a file or random ones, and each rank's share of them.

Random tensors are drawn in pieces of 1,024 tokens, each from its own seed, so that a problem does
not depend on the number of ranks and no rank makes more than its share.
"""

from argparse import Namespace
from dataclasses import dataclass
from math import prod

import numpy as np

from lvxattn.cli.tensors import Array, InputError, Shape, TensorFile, dtype_of, open_tensors
from lvxattn.common.handshake import AUTO, SCHEDULES
from lvxattn.common.layout import share
from lvxattn.common.validation import FLOATING, check_attention, check_mask_rows
from lvxattn.plan.memory import call_memory
from lvxattn.plan.models import MODELS, PROBLEMS, planned

_PIECE = 1024
# The axis along which each tensor is cut into the ranks' shares.
AXES = {"q": 2, "k": 2, "v": 2, "dout": 2, "mask": -1}


@dataclass(frozen=True)
class RandomTensors:
    """Random tensors, drawn slice by slice."""

    seed: int
    shapes: dict[str, Shape]
    dtype: str

    def read(self, name: str, axis: int, part: slice) -> Array:
        """Return a slice of a tensor along one axis, which is 2 except for "mask"."""
        shape = self.shapes[name]
        if name == "mask":
            rng = np.random.default_rng([self.seed, 0])
            lengths = rng.integers(shape[axis] // 2, shape[axis] + 1, shape[0])
            return np.arange(part.start, part.stop) < lengths[:, None, None, None]
        x = np.empty((*shape[:2], part.stop - part.start, shape[3]), dtype_of(self.dtype))
        for number in range(part.start // _PIECE, -(-part.stop // _PIECE)):
            rng = np.random.default_rng([self.seed, *name.encode(), number])
            piece = rng.standard_normal((*shape[:2], _PIECE, shape[3]))
            first = max(part.start, number * _PIECE)
            last = min(part.stop, (number + 1) * _PIECE)
            here = slice(first - number * _PIECE, last - number * _PIECE)
            x[:, :, first - part.start : last - part.start] = piece[:, :, here]
        return x


@dataclass(frozen=True)
class Problem:
    """The whole problem.

    Attributes
    ----------
    title : str
    source : RandomTensors or TensorFile
    shapes : dict
        The whole shapes by name: q, k, v and, if present, dout and mask.
    dtype : str
        Of q, k and v.
    """

    title: str
    source: RandomTensors | TensorFile
    shapes: dict[str, Shape]
    dtype: str


@dataclass(frozen=True)
class Share:
    """One rank's share of a problem.

    Attributes
    ----------
    rows, keys : slice
        Of the whole queries and keys.
    tensors : dict
        By name: q, k, v and, if present, dout and mask.
    """

    rows: slice
    keys: slice
    tensors: dict[str, Array]


def describe(options: Namespace) -> Problem:
    """Return the problem that the command line describes.  Not collective.

    Raises
    ------
    InputError, OSError
        It is invalid, or cannot be read.
    """
    problem = _from_file(options) if options.input else _random(options)
    for name, shape in problem.shapes.items():
        if 8 * prod(shape) >= 2**63:
            raise InputError(f"sizes: {name}: no memory holds shape {shape}")
    whole = {
        name: np.broadcast_to(np.empty((), dtype_of(_dtype(problem, name))), shape)
        for name, shape in problem.shapes.items()  # arrays of the right shapes, without memory
    }
    try:
        q, k, v, mask = (whole.get(name) for name in ("q", "k", "v", "mask"))
        check_attention(q, k, v, scale=options.scale, mask=mask)
        check_mask_rows(mask, problem.shapes["q"][2])
        rows = *problem.shapes["q"][:3], problem.shapes["v"][3]
        if "dout" in whole and whole["dout"].shape != rows:
            expected = f"expected shape (B, H, S_Q, D_V) = {rows}"
            raise ValueError(f"dout: {expected}, got {whole['dout'].shape}")
    except (TypeError, ValueError) as error:
        raise InputError(f"{options.input or 'sizes'}: {error}") from None
    return problem


def least_nbytes(
    problem: Problem, options: Namespace, rank: int, size: int, *, on_host: bool
) -> int:
    """Return how many bytes of its host a rank needs at least.

    Its share and, unless a device computes, results and blocks of others.
    """
    tensors = 0
    for name, shape in problem.shapes.items():
        part = share(shape[AXES[name]], rank, size)
        others = prod(shape) // max(1, shape[AXES[name]])
        itemsize = dtype_of(_dtype(problem, name)).itemsize
        tensors += others * (part.stop - part.start) * itemsize
    if not on_host:
        return tensors
    (B, H, S_Q, D), (_, H_KV, S_KV, D_V) = problem.shapes["q"], problem.shapes["v"]
    q, k = (B, H, S_Q, D), (B, H_KV, S_KV, D)
    schedules = SCHEDULES if options.schedule == AUTO else (options.schedule,)
    layouts = [
        planned(q, k, size, D_V=D_V, dtype=problem.dtype, schedule=schedule, grid=options.grid)
        for schedule in schedules
    ]
    passes = (False, True) if options.backward else (False,)
    return tensors + max(
        min(call_memory(layout, backward=backward)[rank] for layout in layouts)
        for backward in passes
    )


def take_share(problem: Problem, rank: int, size: int) -> Share:
    """Read, or draw, this rank's share.  Not collective.

    Raises
    ------
    InputError, OSError
        It cannot be read, or does not fit in memory.
    """
    rows, keys = (share(problem.shapes[name][2], rank, size) for name in ("q", "k"))
    parts = {"q": rows, "dout": rows, "k": keys, "v": keys, "mask": keys}
    tensors = {}
    for name, shape in problem.shapes.items():
        try:
            tensors[name] = problem.source.read(name, AXES[name], parts[name])
        except MemoryError:
            raise InputError(
                f"{name}: a 1/{size} of shape {shape} does not fit in memory"
            ) from None
    return Share(rows, keys, tensors)


def _from_file(options: Namespace) -> Problem:
    file = open_tensors(options.input)
    names = ["q", "k", "v", *["dout"] * options.backward]
    for name in names:
        if name not in file.tensors:
            there = ", ".join(file.tensors) or "nothing"
            raise InputError(f"{options.input}: expected a tensor {name}, found {there}")
    names += ["mask"] * ("mask" in file.tensors)
    for name in names:
        dtype = file.tensors[name].dtype
        if dtype not in (*FLOATING, *["bool"] * (name == "mask")):
            expected = ", ".join(FLOATING) + ", or bool" * (name == "mask")
            raise InputError(f"{options.input}: {name}: expected {expected}, got {dtype}")
    shapes = {name: file.tensors[name].shape for name in names}
    return Problem(options.input, file, shapes, file.tensors["q"].dtype)


def _random(options: Namespace) -> Problem:
    fixed = PROBLEMS.get(options.model)
    model = fixed or MODELS.get(options.model)

    def size(name: str, otherwise: int) -> int:
        given = getattr(options, name)
        return int(otherwise if given is None else given)

    S_Q, B = size("text_tokens", fixed.S_Q if fixed else 1024), size("batch", 1)
    H = size("heads", model.heads if model else 8)
    H_KV = size("kv_heads", model.kv_heads if model else H)
    D = size("head_dim", model.head_dim if model else 64)
    title = model.name if model else "random tensors"
    if options.visual_tokens is None and options.model in MODELS:
        frames = size("frames", 8)
        S_KV = frames * MODELS[options.model].tokens_per_frame
        title += f", {frames:,} frame{'s' * (frames != 1)}"
    else:
        S_KV = size("visual_tokens", fixed.S_KV if fixed else 16384)
    D_V = size("value_dim", D)
    shapes: dict[str, Shape] = {
        "q": (B, H, S_Q, D),
        "k": (B, H_KV, S_KV, D),
        "v": (B, H_KV, S_KV, D_V),
    }
    if options.backward:
        shapes["dout"] = B, H, S_Q, D_V
    if options.mask == "padding":
        shapes["mask"] = B, 1, 1, S_KV
        title += ", padded"
    dtype = options.dtype or "float32"
    return Problem(title, RandomTensors(options.seed, shapes, dtype), shapes, dtype)


def _dtype(problem: Problem, name: str) -> str:
    if isinstance(problem.source, TensorFile):
        return problem.source.tensors[name].dtype
    return "bool" if name == "mask" else problem.dtype
