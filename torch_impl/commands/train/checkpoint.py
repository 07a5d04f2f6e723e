"""Checkpoints to resume from: `torch.distributed.checkpoint` in three folders.

    checkpoint.new     being written, by all ranks     then, by rank 0, two renames:
    checkpoint         the last complete one           checkpoint -> checkpoint.old
    checkpoint.old     the one before                  checkpoint.new -> checkpoint

A kill at any time leaves a complete one: `checkpoint` or, between the renames, `checkpoint.old`.
Every rank has the same weights; they are written once, and read by any number of ranks.  No state
of a random generator is stored: clips follow from seed and step, and nothing else is random.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from lvxattn.cli import InputError
from lvxattn.common.validation import on_rank
from lvxattn.torch_impl.commands.processes import on_rank_0
from lvxattn.torch_impl.commands.train.options import Settings
from lvxattn.torch_impl.commands.train.training_report import Curve
from lvxattn.torch_impl.group import Group

_NAME = "checkpoint"


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    curve: Curve,
    settings: Settings,
    group: Group,
) -> None:
    """Write a checkpoint, and remove the one before when it is complete.

    Collective: every rank of the group calls this.

    Raises
    ------
    InputError
        It cannot be written; on all ranks.  The one before is kept.
    RuntimeError
        The ranks' weights differ.
    """
    _check_equal(model, group)
    new, last, old = (folder / f"{_NAME}{end}" for end in (".new", "", ".old"))
    state = {
        **_state(model, optimizer),
        "run": json.dumps({"settings": asdict(settings), "curve": curve.rows}),
    }
    failure = f"cannot write {folder}"
    on_rank_0(lambda: shutil.rmtree(new, ignore_errors=True), failure, group)
    with _plainly("write", new, group):
        write_state(
            state, checkpoint_id=new, process_group=group.group, no_dist=group.group is None
        )

    def swap() -> None:
        if last.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(last, old)
        os.rename(new, last)
        shutil.rmtree(old, ignore_errors=True)

    on_rank_0(swap, failure, group)


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
        There is none, it is damaged, or its run has other settings; on all ranks.
    """
    source = group.allgather(_last(folder))[0]
    if source is None:
        raise InputError(f"--resume: no checkpoint in {folder}")
    told: dict[str, Any] = {"run": ""}
    with _plainly("read", source, group):
        _read(told, source, group)
    run = json.loads(told["run"])
    difference = settings.difference(run["settings"])
    if difference:
        raise InputError(f"--resume: the run in {folder} has {difference}")
    state: dict[str, Any] = _state(model, optimizer)
    with _plainly("read", source, group):
        _read(state, source, group)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    return Curve(run["curve"])


def _last(folder: Path) -> Path | None:
    """Return the last complete checkpoint, if any."""
    for name in (_NAME, f"{_NAME}.old"):
        if (folder / name / ".metadata").exists():
            return folder / name
    return None


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return weights and optimizer moments by parameter name."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _read(state: dict[str, Any], source: Path, group: Group) -> None:
    read_state(state, checkpoint_id=source, process_group=group.group, no_dist=group.group is None)


@contextmanager
def _plainly(verb: str, path: Path, group: Group) -> Iterator[None]:
    """Raise any rank's failure as an InputError of one line, and ignore PyTorch's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:  # raised on all ranks, with each rank's failure
        (rank, (problem, _)), *_ = error.failures.items()
        failure = InputError(f"cannot {verb} {path}: {_line(problem)}")
        raise on_rank(failure, rank, group.size) from None
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as problem:
        raise InputError(f"cannot {verb} {path}: {_line(problem)}") from None


def _line(problem: BaseException) -> str:
    lines = str(problem).splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'no message'}"


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
