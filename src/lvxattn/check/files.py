"""A problem's tensors in safetensors files."""

import inspect
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.cases import Case
from lvxattn.check.problem import Problem
from lvxattn.check.rounding_model import visible
from lvxattn.cli.tensors import create, open_tensors

Array = npt.NDArray[Any]


def inputs_of(problem: Problem) -> dict[str, Array]:
    """Return q, k, v, dout and, if there is one, the mask; a callable one as what it yields."""
    arrays = {name: getattr(problem, name) for name in ("q", "k", "v", "dout")}
    mask = visible(problem)
    return arrays if mask is None else {**arrays, "mask": mask}


def mask_text(problem: Problem) -> str:
    """Say what the mask is; of a callable one the text, and the numbers that it uses."""
    rule = problem.mask
    if not callable(rule):
        return problem.case.mask
    try:
        text = dedent(inspect.getsource(rule)).strip()
    except (OSError, TypeError):  # no source where the package is installed without
        text = problem.case.mask
    values = inspect.getclosurevars(rule).nonlocals
    numbers = [f"{name} = {x}" for name, x in values.items() if not isinstance(x, Case)]
    case = problem.case
    numbers += [f"case.S_Q = {case.S_Q}", f"case.S_KV = {case.S_KV}"]
    return f"{text}\n# {', '.join(numbers)}"


def write_tensors(path: str | Path, arrays: dict[str, Array], notes: dict[str, str]) -> None:
    """Write a safetensors file.

    Parameters
    ----------
    path : str
    arrays : dict
    notes : dict
        The file's metadata.

    Raises
    ------
    OSError
    """
    shapes = {name: (x.dtype.name, x.shape) for name, x in arrays.items()}
    file = create(str(path), shapes, notes)
    for name, x in arrays.items():
        file.write(name, 0, slice(0, x.shape[0]), x)


def read_tensors(path: str | Path) -> dict[str, Array]:
    """Read all tensors of a safetensors file.

    Raises
    ------
    InputError
        It is none, or is damaged.
    OSError
    """
    file = open_tensors(str(path))
    return {
        name: np.ascontiguousarray(file.read(name, 0, slice(0, tensor.shape[0])))
        for name, tensor in file.tensors.items()
    }
