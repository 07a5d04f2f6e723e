"""Checkpoints to resume from: JSON and safetensors, with checksums, in three folders.

    checkpoint.new-X   being written, by all ranks     then, by rank 0, two renames:
    checkpoint         the last complete one           checkpoint -> checkpoint.old
    checkpoint.old     the one before                  checkpoint.new-X -> checkpoint

A kill at any time leaves a complete one: `checkpoint` or, between the renames, `checkpoint.old`.

    part-R.safetensors   of P: every P-th weight and moment of the optimizer, from number R on
    manifest.json        settings, curve, and the optimizer's steps by weight
    SHA256SUMS           of all of these, as sha256sum writes it

Every rank has the same weights; they are written once, and read by any number of ranks.  All
checksums are verified before anything is used, and nothing is unpickled.  No state of a random
generator is stored: clips follow from seed and step, and nothing else is random.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lvxattn.cli import InputError
from lvxattn.cli.tensors import Array, TensorFile, create, open_tensors
from lvxattn.common.new_file import new_file, write_file
from lvxattn.common.regular_file import open_regular
from lvxattn.common.validation import dtype_name, on_rank
from lvxattn.torch_impl.commands.processes import on_rank_0, together
from lvxattn.torch_impl.commands.train.options import Settings
from lvxattn.torch_impl.commands.train.training_report import COLUMNS, Curve, Row
from lvxattn.torch_impl.group import Group

NAME, NEW, OLD = "checkpoint", "checkpoint.new", "checkpoint.old"
UNFINISHED = re.compile(re.escape(NEW) + "-[0-9a-f]{16}")
"""Names of folders that were being written."""

_MANIFEST, _SUMS, _FORMAT = "manifest.json", "SHA256SUMS", 1
_LINE = re.compile(rb"([0-9a-f]{64})  (manifest\.json|part-[0-9]{1,9}\.safetensors)")
# What AdamW keeps of every weight, besides the number of its steps.
_MOMENTS = "exp_avg", "exp_avg_sq"
# All whole numbers below are floats, too.
_LARGEST = 1 << 53
_LONGEST = 1 << 27  # bytes of JSON or of checksums


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    curve: Curve,
    settings: Settings,
    group: Group,
) -> None:
    """Write a checkpoint; keep the one before.

    Collective: every rank of the group calls this.

    Raises
    ------
    InputError
        It cannot be written; on all ranks.  Those before are kept.
    RuntimeError
        The ranks' weights differ.
    """
    _check_equal(model, group)
    # Nobody else's: ranks of a killed run may live on for a while, and write to their own.
    new = folder / f"{NEW}-{group.allgather(token_hex(8))[0]}"
    failure = f"cannot write {folder / NAME}"
    tensors, steps = _state(model, optimizer)
    part = {name: tensors[name] for name in sorted(tensors)[group.rank :: group.size]}
    manifest = {
        "format": _FORMAT,
        "settings": asdict(settings),
        "optimizer_steps": steps,
        "curve": curve.rows,
    }

    def complete() -> None:
        write_file(new / _MANIFEST, json.dumps(manifest))
        sums = {_MANIFEST: _sha256(new / _MANIFEST)}
        sums |= {_part(rank): digest for rank, digest in enumerate(digests)}
        write_file(new / _SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        if (folder / NAME).exists():
            _remove(folder / OLD)
            os.rename(folder / NAME, folder / OLD)
        os.rename(new, folder / NAME)

    try:
        on_rank_0(new.mkdir, failure, group)
        digest = together(lambda: _write(new / _part(group.rank), part), failure, group)
        digests = group.allgather(digest)
        on_rank_0(complete, failure, group)
    finally:
        if group.rank == 0:
            shutil.rmtree(new, ignore_errors=True)  # it has another name if all went well


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    group: Group,
) -> Curve:
    """Read the last complete checkpoint into model and optimizer.

    Collective: every rank of the group calls this; any number of ranks, whatever wrote it.

    Returns
    -------
    Curve
        The curve so far.

    Raises
    ------
    InputError
        There is none, it is damaged, or its run has other settings; on all ranks.  Model and
        optimizer are as they were.
    """

    def read() -> tuple[_Manifest, dict[str, Array]]:
        source = next((path for name in (NAME, OLD) if (path := folder / name).is_dir()), None)
        if source is None:
            raise InputError(f"--resume: no checkpoint in {folder}")
        try:
            manifest, files = _verify(source)
            difference = settings.difference(manifest.settings)
            if not difference:
                return manifest, _read(files, _expected(model, manifest))
        except (InputError, OSError) as problem:
            text = f"cannot read {source}: {_told(problem)}{_instead(source)}"
            raise InputError(text) from None
        raise InputError(f"--resume: the run in {folder} has {difference}")

    manifest, arrays = together(read, f"cannot read {folder}", group)
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, weight in model.named_parameters():
        if name in manifest.steps:
            state = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(manifest.steps[name])), **state}
    return Curve(manifest.rows)


class _Manifest(NamedTuple):
    """The manifest.

    Attributes
    ----------
    settings : dict
    steps : dict
        How often the optimizer has changed each weight that it has changed.
    rows : list
        Of the curve.
    """

    settings: dict[str, object]
    steps: dict[str, int]
    rows: list[Row]


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return weights and moments by name, and the optimizer's steps by weight."""
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    steps = {}
    for name, weight in model.named_parameters():
        if state := optimizer.state.get(weight):
            steps[name] = int(state["step"])
            tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
    return tensors, steps


def _expected(model: nn.Module, manifest: _Manifest) -> dict[str, Tensor]:
    """Return, by name, a tensor of the dtype and shape of each that a checkpoint must have."""
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    weights = dict(model.named_parameters())
    if unknown := manifest.steps.keys() - weights.keys():
        raise InputError(f"{_MANIFEST}: the model has no weight {min(unknown)!r:.80}")
    of_each = {f"{m}.{name}": weights[name] for m in _MOMENTS for name in manifest.steps}
    return tensors | of_each


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a file of tensors; return its SHA-256."""
    shapes = {name: (dtype_name(x), tuple(x.shape)) for name, x in tensors.items()}
    with new_file(path) as new:
        file = create(new, shapes, {})
        for name, x in tensors.items():
            file.write(name, 0, slice(0, len(x)), x.detach().numpy())
    return _sha256(path)


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise InputError(f"{path.name} is damaged: more than {_LONGEST} bytes")
    return content


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _verify(source: Path) -> tuple[_Manifest, list[TensorFile]]:
    """Verify all checksums; return the manifest, and the files of tensors.

    Raises
    ------
    InputError, OSError
    """
    *lines, end = _content(source / _SUMS).split(b"\n")
    entries = [entry for line in lines if (entry := _LINE.fullmatch(line))]
    names = [entry[2].decode() for entry in entries]
    if end or len(entries) != len(lines) or _MANIFEST not in names:
        raise InputError(f"{_SUMS} is damaged")
    for name, entry in zip(names, entries, strict=True):
        if _sha256(source / name) != entry[1].decode():
            raise InputError(f"{name} is damaged: its SHA-256 is not that in {_SUMS}")
    files = [open_tensors(str(source / name)) for name in names if name != _MANIFEST]
    return _parse(_content(source / _MANIFEST)), files


def _parse(text: bytes) -> _Manifest:
    try:
        found = json.loads(text)
        if found["format"] != _FORMAT:
            raise InputError(f"{_MANIFEST}: expected format {_FORMAT}, got {found['format']!r:.40}")
        manifest = _Manifest(found["settings"], found["optimizer_steps"], found["curve"])
        if not isinstance(manifest.settings, dict):
            raise TypeError("settings")
        if not isinstance(manifest.rows, list) or not all(
            _is_row(row, step) for step, row in enumerate(manifest.rows, 1)
        ):
            raise TypeError("curve")
        if not all(type(n) is int and 0 < n <= len(manifest.rows) for n in manifest.steps.values()):
            raise TypeError("optimizer_steps")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{_MANIFEST}: {type(error).__name__} {error}") from None
    return manifest


def _is_row(row: Any, step: int) -> bool:
    """Return whether this is a curve's row after a step."""
    found = dict(zip(COLUMNS, row, strict=True))
    loss, held_out = found.pop("loss"), found.pop("held_out")
    numbers = [*found.values(), *([] if held_out is None else [held_out])]
    # A training that diverges has a loss that is not finite.
    return found["step"] == step and type(loss) is float and all(map(_is_number, numbers))


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x < _LARGEST


def _read(files: list[TensorFile], expected: dict[str, Tensor]) -> dict[str, Array]:
    """Read all tensors.

    Raises
    ------
    InputError, OSError
        They are not the expected ones, or cannot be read.
    """
    wanted = {name: (dtype_name(x), tuple(x.shape)) for name, x in expected.items()}
    found = {name: (x.dtype, x.shape) for file in files for name, x in file.tensors.items()}
    if len(found) < sum(len(file.tensors) for file in files):
        raise InputError("a tensor is in two files")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(f"{name!r:.80}: expected {wanted.get(name)}, got {found.get(name)}")
    return {
        name: file.read(name, 0, slice(0, x.shape[0]))
        for file in files
        for name, x in file.tensors.items()
    }


def _instead(source: Path) -> str:
    """Describe the checkpoint before, if it is intact."""
    old = source.parent / OLD
    try:
        steps = len(_verify(old)[0].rows)
    except (InputError, OSError):
        return ""
    more = f"; without that folder, {old} is resumed, after step {steps}"
    return "" if old == source else more


def _told(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.filename:
        return f"{Path(problem.filename).name}: {problem.strerror}"
    return " ".join(str(problem).split())  # a file may hold names of several lines


def _part(rank: int) -> str:
    return f"part-{rank}.safetensors"


def _check_equal(model: nn.Module, group: Group) -> None:
    """Check that all ranks have the same weights, to the bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    by_rank = group.allgather(digest.hexdigest())
    for rank, other in enumerate(by_rank):
        if other != by_rank[0]:
            error = RuntimeError("weights: expected those of rank 0, got others")
            raise on_rank(error, rank, len(by_rank))
