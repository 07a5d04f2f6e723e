"""The training run, top-down.

    read   ->  [resume]  ->  train, looking at held-out images now and then
                                |  checkpoint now and then, and at the end
                                v
                             test on images seen for the first time  ->  report, pictures

Of the video each rank holds a part, of the model each holds all; the weights stay equal because all
take the same steps, which every checkpoint verifies.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch

from lvxattn.cli import InputError
from lvxattn.common.meter import Meter
from lvxattn.common.validation import raise_together
from lvxattn.torch_impl.commands.train import checkpoint
from lvxattn.torch_impl.commands.train.attention_maps import Needle, find_needles
from lvxattn.torch_impl.commands.train.data import TEST, TRAIN, Images, load_images
from lvxattn.torch_impl.commands.train.loop import Run, train
from lvxattn.torch_impl.commands.train.options import TARGET, Settings
from lvxattn.torch_impl.commands.train.report import Reporter, Test, Traffic, complain
from lvxattn.torch_impl.commands.train.step import add_up, answer, questions
from lvxattn.torch_impl.group import AnyGroup, Group

_TESTS, _DRAWN = 8, 6
"""Batches of questions at the end, and questions in the picture."""

_FILES = "checkpoint", "curve.csv", "curve.png", "needles.png"

T = TypeVar("T")


def run_training(options: Namespace, group: AnyGroup = None) -> int:
    """Train, test and report.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    options : argparse.Namespace
        As `add_options` defines it.
    group : ProcessGroup, DeviceMesh or Group, optional
        The world unless given.  On the CPU, and with one file system for all.

    Returns
    -------
    int
        0, or 1 if the run was interrupted or fell short of ``--target``, or 2 if the input is bad;
        the same on all ranks.
    """
    comm = Group.of(group)
    try:
        return 0 if _run(options, comm) else 1
    except InputError as error:
        complain(f"error: {error}", comm)
        return 2


def _run(options: Namespace, group: Group) -> bool:
    # 1. What is there: images, a folder, maybe a checkpoint.
    began = time.perf_counter()
    settings, folder = Settings.of(options), Path(options.output)
    parts = _together(_read_images, group)
    _together(lambda: _make(folder) if group.rank == 0 else None, group)
    run = Run.begin(settings, parts, group, options.schedule)
    _check_schedule(run)
    if options.resume:
        run.curve = checkpoint.load(folder, run.model, run.optimizer, settings, group)
    reporter = Reporter(group.rank == 0 and not options.quiet)
    reporter.begin(settings, parts, run.model, len(run.curve))

    # 2. Training.
    if train(run, options, reporter, began):
        reporter.say(f"\n  interrupted after step {len(run.curve)}; --resume goes on from there")
        return False

    # 3. What it has learnt, asked about images that nobody has looked at before.
    test = _test(run)
    reporter.tested(test, settings.frames)
    if group.size > 1:
        reporter.traffic(_traffic(run))
    layer, needles = find_needles(run.model, run.clips(TEST, _TESTS, (1, settings.frames, _DRAWN)))
    _together(lambda: _draw(run, options, layer, needles) if group.rank == 0 else None, group)
    reporter.say(f"  wrote {', '.join(_FILES)} in {folder}")
    reporter.say(f"  all in all {time.perf_counter() - began:.1f} s")
    if options.target is not None and test.accuracy < options.target:
        wanted = f"{options.target:.1%} were to be"
        complain(f"{test.accuracy:.1%} of the answers are right, {wanted}", group)
        return False
    return True


def _read_images() -> tuple[Images, Images, Images]:
    for module in ("sklearn", "matplotlib"):
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise InputError(f"{error}; the run needs scikit-learn and matplotlib") from None
    return load_images()


def _check_schedule(run: Run) -> None:
    """Find out before the first step whether the schedule can serve so many ranks."""
    try:
        run.model.layout(run.clips(TRAIN, 0, run.settings.curriculum.shape(0)))
    except ValueError as error:
        raise InputError(str(error)) from None


def _make(folder: Path) -> None:
    """Make a folder, and see that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as problem:
        raise InputError(f"--output: cannot write {folder}: {problem.strerror}") from None


@torch.no_grad()
def _test(run: Run) -> Test:
    """Ask about images that took no part in training, not even to tell when to end it."""
    settings, group = run.settings, run.model.group
    right, asked, images = 0.0, 0, set[int]()
    for n in range(_TESTS):
        clips = run.clips(TEST, n, settings.curriculum.final)
        right += answer(run.model, clips)[1]
        asked += questions(clips)
        images.update(clips.images.flatten().tolist())
    everyone = set[int]().union(*group.allgather(images))
    return Test(int(add_up([right], group)[0]), asked, len(everyone))


def _traffic(run: Run) -> Traffic:
    """Take one step's forward and backward by several schedules, and see what each of them sends.

    They are the paper's two, and the one that the run has taken.
    """
    clips = run.clips(TRAIN, len(run.curve), run.settings.curriculum.final)
    sent, losses, chosen = {}, [], run.model.schedule
    for schedule in dict.fromkeys(("lv-xattn", "ring", run.model.layout(clips).schedule)):
        run.model.schedule, meter = schedule, Meter()
        loss, _ = answer(run.model, clips, meter=meter)
        loss.backward()
        nbytes, whole = add_up([meter.bytes, float(loss.detach())], run.model.group)
        sent[schedule] = int(nbytes)
        losses.append(whole)
    run.model.schedule = chosen
    return Traffic(sent, (max(losses) - min(losses)) / losses[0])


def _draw(run: Run, options: Namespace, layer: int, needles: list[Needle]) -> None:
    from lvxattn.torch_impl.commands.train.draw import (  # matplotlib takes its time
        draw_curve,
        draw_needles,
    )

    folder, ranks = Path(options.output), run.model.group.size
    title = f"Find the needle in a video of {run.settings.frames:,} frames"
    try:
        draw_curve(folder / "curve.png", run.curve, options.target or TARGET, title)
        draw_needles(folder / "needles.png", needles, layer, ranks)
    except OSError as problem:
        raise InputError(f"--output: cannot write {folder}: {problem.strerror}") from None


def _together(act: Callable[[], T], group: Group) -> T:
    """Do something on every rank; if one of them cannot, raise its error on all."""
    results, error = list[T](), None
    try:
        results.append(act())
    except InputError as problem:
        error = problem
    raise_together(error, group)
    return results[0]
