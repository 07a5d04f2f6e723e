"""Golden files: cases with their fp64 results, for tests that cannot run the reference.

A folder holds one safetensors file a case and a manifest:

    {"format": 1, "lvxattn": VERSION, "suite": "quick", "seed": 0, "left_out": {CASE: WHY},
     "cases": {CASE: {"file", "sha256", "bytes", "group", "reason", "scale", "mask",
                      "q_kinds", "kv_kinds", "tensors": {NAME: {"dtype", "shape"}}}}}

q, k, v, dout and an additive mask are float32; a callable mask is stored as the bool array that it
returns; out, lse, dq, dk and dv are float64.

Checksums verify that a file is intact.  Recomputed results are not compared by them: another CPU or
BLAS rounds sums differently.
"""

import hashlib
import inspect
import os
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import numpy.typing as npt

import lvxattn
from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.cases import Case, suite_of
from lvxattn.check.golden_manifest import FORMAT, MANIFEST, format_manifest, read_manifest
from lvxattn.check.judge import RESULTS, judge, truth_of
from lvxattn.cli.tensors import InputError, create, open_tensors
from lvxattn.common.new_file import new_file, write_file
from lvxattn.common.regular_file import open_regular, printable
from lvxattn.common.validation import check_attention, check_mask_rows

Array = npt.NDArray[Any]

SHIPPED = Path(__file__).parent / "golden_files"


def golden(name: str, folder: str | Path = SHIPPED) -> dict[str, Any]:
    """Load one case's tensors.

    Parameters
    ----------
    name : str
        One of `golden_names`.
    folder : str, optional
        One written by `write_golden`; default: the files that come with the package.

    Returns
    -------
    dict
        q, k, v, dout and, if there is one, mask; scale, a float; out, lse, dq, dk, dv.

    Raises
    ------
    ValueError
        There is no such case.
    InputError, OSError
        The files are missing or damaged.

    Examples
    --------
    >>> from lvxattn.check import golden
    >>> case = golden("one-query")
    >>> sorted(case)
    ['dk', 'dout', 'dq', 'dv', 'k', 'lse', 'out', 'q', 'scale', 'v']
    >>> case["q"].dtype.name, case["out"].dtype.name
    ('float32', 'float64')
    """
    cases = read_manifest(Path(folder))["cases"]
    if name not in cases:
        raise ValueError(f"name: expected one of {', '.join(cases)}, got {name!r}")
    file = Path(folder, cases[name]["file"])
    damage = _damage(file, cases[name])
    if damage:
        raise InputError(f"{file}: {damage}")
    return {**read_tensors(file), "scale": cases[name]["scale"]}


def golden_names(folder: str | Path = SHIPPED) -> list[str]:
    """Return the names of the cases in a folder.

    Parameters
    ----------
    folder : str, optional
        Default: that of the files that come with the package.

    Returns
    -------
    list of str

    Raises
    ------
    InputError
        There is no valid manifest.

    Examples
    --------
    >>> from lvxattn.check import golden_names
    >>> golden_names()[:2]
    ['gaussian', 'ragged-lengths']
    """
    return list(read_manifest(Path(folder))["cases"])


def write_golden(folder: str | Path, suite: str = "quick", seed: int = 0) -> dict[str, Any]:
    """Compute the cases of a suite in fp64 and write them.

    Parameters
    ----------
    folder : str
        Created if missing; older golden files in it are replaced.
    suite : str
    seed : int

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    InputError
        There are other files in the folder.
    OSError
        The folder cannot be written.

    Examples
    --------
    >>> write_golden("golden", "tiny")
    Traceback (most recent call last):
    ValueError: suite: expected one of quick, full, got 'tiny'
    """
    cases, path = suite_of(suite), Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    old = read_manifest(path) if (path / MANIFEST).exists() else {"cases": {}}
    ours = {MANIFEST, *(entry["file"] for entry in old["cases"].values())}
    others = [file.name for file in path.iterdir() if file.name not in ours]
    if others:
        raise InputError(
            f"{folder}: expected an empty folder, or one of golden files, and there is {others[0]}"
        )
    for name in ours:
        (path / name).unlink(missing_ok=True)
    left_out, entries = {}, {}
    for case in cases:
        why = _needless(case)
        if why:
            left_out[case.name] = why
        else:
            entries[case.name] = _write(path, draw(case, "float32", seed))
    manifest = {
        "format": FORMAT,
        "lvxattn": lvxattn.__version__,
        "suite": suite,
        "seed": seed,
        "left_out": left_out,
        "cases": entries,
    }
    write_file(path / MANIFEST, format_manifest(manifest))
    return manifest


def verify_golden(folder: str | Path = SHIPPED) -> list[str]:
    """Verify that files are intact, and that the reference reproduces their results.

    Each result, recomputed from the inputs in the file, must be within the limit for float64.

    Parameters
    ----------
    folder : str, optional
        Default: that of the files that come with the package.

    Returns
    -------
    list of str
        A line for each wrong file, with the reason; empty if all are correct.

    Raises
    ------
    InputError
        There is no valid manifest.

    Examples
    --------
    >>> verify_golden("nowhere")
    Traceback (most recent call last):
    lvxattn.cli.tensors.InputError: nowhere: no golden files: there is no manifest.json
    """
    path = Path(folder)
    manifest = read_manifest(path)
    known = {MANIFEST, *(entry["file"] for entry in manifest["cases"].values())}
    extra = sorted(file.name for file in path.iterdir() if file.name not in known)
    lines = [f"{name}: not in the manifest" for name in extra]
    for name, entry in manifest["cases"].items():
        wrong = _wrong(path / entry["file"], name, entry)
        lines += [f"{entry['file']}: {wrong}"] if wrong else []
    return lines


def _needless(case: Case) -> str:
    """Return why the case needs no file; empty if it needs one."""
    if case.memory != "contiguous":
        return "its point is how the arrays lie in memory, which a file does not keep"
    if case.calls:
        return "its point is what is called beside it"
    if case.quick and case.group == "combinations":
        return "it combines what others have alone"
    if case.group == "tables" or case.mask == "all dead":
        return "what is right can be written down without a file"
    return ""


def _write(path: Path, problem: Problem) -> dict[str, Any]:
    """Write one case and return its entry in the manifest."""
    arrays = {**inputs_of(problem), **truth_of(problem).results}
    case, name = problem.case, f"{problem.case.name}.safetensors"
    notes = {"case": case.name, "reason": case.reason, "scale": repr(problem.scale)}
    notes |= {"seed": str(problem.seed), "mask": mask_text(problem)}
    write_tensors(path / name, arrays, notes)
    content = (path / name).read_bytes()
    return {
        "file": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "group": case.group,
        "reason": case.reason,
        "scale": problem.scale,
        "mask": case.mask,
        "q_kinds": _shortest(problem.q_kinds),
        "kv_kinds": _shortest(problem.kv_kinds),
        "tensors": _table(arrays),
    }


def _table(arrays: dict[str, Array]) -> dict[str, Any]:
    return {key: {"dtype": x.dtype.name, "shape": list(x.shape)} for key, x in arrays.items()}


def _shortest(kinds: Array) -> list[int]:
    """Return the kinds of rows; empty if there is only one kind."""
    return [int(kind) for kind in kinds] if kinds.any() else []


def _damage(file: Path, entry: dict[str, Any]) -> str:
    """Return how a file differs from that of the manifest; empty if it does not."""
    try:
        with open_regular(file) as opened:
            size, digest = os.fstat(opened.fileno()).st_size, hashlib.file_digest(opened, "sha256")
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest.hexdigest() != entry["sha256"]:
        return f"damaged: {size:,} bytes of another checksum; {entry['bytes']:,} expected"
    return ""


def _wrong(file: Path, name: str, entry: dict[str, Any]) -> str:
    """Return what is wrong with one file; empty if it is correct."""
    damage = _damage(file, entry)
    if damage:
        return damage
    try:
        arrays = read_tensors(file)
    except InputError as error:
        return str(error).removeprefix(f"{file}: ")
    found, expected = _table(arrays), entry["tensors"]
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            return printable(
                f"{key}: expected {expected.get(key)} as in the manifest, got {found.get(key)}"
            )
    try:
        problem = _problem(name, entry, arrays)
    except (TypeError, ValueError) as error:
        return str(error)
    truth = truth_of(problem)
    # All parts of the limit are proportional to unit roundoffs: float32's, 2**29 times float64's.
    limits = {key: limit * 2.0**-29 for key, limit in truth.limits.items()}
    truth = replace(truth, limits=limits)
    far = [v for v in (judge(key, arrays[key], problem, truth) for key in RESULTS) if not v.passed]
    return "; ".join(
        f"{v.name}: {v.what or f'relative error {v.error:.1e}, limit {v.limit:.1e}'}; at {v.index} "
        f"{v.got:.17g}, computed now {v.expected:.17g}"
        for v in far
    )


def _problem(name: str, entry: dict[str, Any], arrays: dict[str, Array]) -> Problem:
    """Return the problem in a file, independently of today's case of that name.

    Raises
    ------
    TypeError, ValueError
        The file has no problem, or no results of it.
    """
    for key in ("q", "k", "v", "dout", *RESULTS):
        if key not in arrays:
            raise ValueError(f"{key}: missing")
    q, k, v, dout = (arrays[key] for key in ("q", "k", "v", "dout"))
    check_attention(q, k, v, scale=entry["scale"], mask=arrays.get("mask"))
    check_mask_rows(arrays.get("mask"), q.shape[2])
    rows = *q.shape[:3], v.shape[3]
    shapes = {"dout": rows, "out": rows, "lse": rows[:3], "dq": q.shape, "dk": k.shape}
    for key, shape in {**shapes, "dv": v.shape}.items():
        if arrays[key].shape != shape:
            raise ValueError(f"{key}: expected shape {shape}, got {arrays[key].shape}")
    for key, length in (("q_kinds", q.shape[2]), ("kv_kinds", k.shape[2])):
        if len(entry[key]) not in (0, length):
            raise ValueError(f"{key}: expected {length} kinds of rows, got {len(entry[key])}")
    case = Case(name, entry["group"], entry["reason"], *q.shape[:2], *k.shape[1:2])
    case = replace(case, S_Q=q.shape[2], S_KV=k.shape[2], D=q.shape[3], D_V=v.shape[3])
    q_kinds = np.array(entry["q_kinds"] or [0] * case.S_Q)
    kv_kinds = np.array(entry["kv_kinds"] or [0] * case.S_KV)
    mask, scale = arrays.get("mask"), entry["scale"]
    return Problem(case, 0, "float32", q, k, v, dout, scale, mask, q_kinds, kv_kinds)


# Tensors in safetensors files.


def inputs_of(problem: Problem) -> dict[str, Array]:
    """Return q, k, v, dout and, if any, the mask; a callable one as the array that it returns."""
    arrays = {name: getattr(problem, name) for name in ("q", "k", "v", "dout")}
    mask = problem.dense_mask()
    return arrays if mask is None else {**arrays, "mask": mask}


def mask_text(problem: Problem) -> str:
    """Describe the mask: its kind, or the source of a callable one and the numbers in it."""
    rule = problem.mask
    if not callable(rule):
        return problem.case.mask
    try:
        text = dedent(inspect.getsource(rule)).strip()
    except (OSError, TypeError):  # the package may be installed without its sources
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
    with new_file(path) as new:
        file = create(new, shapes, notes)
        for name, x in arrays.items():
            file.write(name, 0, slice(0, x.shape[0]), x)


def read_tensors(path: str | Path) -> dict[str, Array]:
    """Read all tensors of a safetensors file.

    Raises
    ------
    InputError
        It is no safetensors file, or damaged.
    OSError
    """
    file = open_tensors(str(path))
    return {
        name: np.ascontiguousarray(file.read(name, 0, slice(0, *tensor.shape[:1])))
        for name, tensor in file.tensors.items()
    }
