"""The training run, top-down.

    read   ->  [resume]  ->  train, with looks at held-out images
                                |  and checkpoints
                                v
                             test on unseen images  ->  report, pictures

Each rank holds a part of the video and the whole model; the weights stay equal because all ranks
take the same steps, which every checkpoint verifies.
"""

import time
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import torch

from lvxattn.cli import InputError
from lvxattn.cli.run_ranks import check_room
from lvxattn.common.meter import Meter
from lvxattn.common.validation import raise_together
from lvxattn.torch_impl.commands.processes import on_rank_0
from lvxattn.torch_impl.commands.train import checkpoint
from lvxattn.torch_impl.commands.train.data import (
    TEST,
    TRAIN,
    Images,
    least_nbytes,
    load_images,
)
from lvxattn.torch_impl.commands.train.model import Finder, Needle, find_needles
from lvxattn.torch_impl.commands.train.options import TARGET, Settings
from lvxattn.torch_impl.commands.train.run_folder import run_folder
from lvxattn.torch_impl.commands.train.training import Run, add_up, train
from lvxattn.torch_impl.commands.train.training_report import Reporter, Test, Traffic, complain
from lvxattn.torch_impl.group import AnyGroup, Group

_TESTS, _DRAWN = 8, 6
"""Batches of questions at the end, and questions in the picture."""


def run_training(options: Namespace, group: AnyGroup = None) -> int:
    """Train, test and report.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    options : argparse.Namespace
        As `add_options` defines it.
    group : ProcessGroup, DeviceMesh or Group, optional
        Default: the world.  On the CPU, with one file system for all.

    Returns
    -------
    int
        0; 1 if the run was interrupted or missed ``--target``; 2 if the input is bad; the same on
        all ranks.
    """
    comm = Group.of(group)
    try:
        return 0 if _run(options, comm) else 1
    except InputError as error:
        complain(f"error: {error}", comm)
        return 2


def _run(options: Namespace, group: Group) -> bool:
    # 1. Images, a folder to write to, maybe a checkpoint to resume.
    began = time.perf_counter()
    settings, folder = Settings.of(options), Path(options.output)
    parts = _read_images(settings.model, group)
    need = least_nbytes(settings.curriculum.final, group.size, settings.torch_dtype)
    memory = check_room(need, group, "give fewer --frames, a smaller --batch, or use more hosts")
    with run_folder(folder, group, resume=options.resume):
        run = Run.begin(settings, parts, group, options.schedule)
        _check_schedule(run)
        if options.resume:
            run.curve = checkpoint.load(folder, run.model, run.optimizer, settings, group)
        return _finish(run, options, began, memory)


def _finish(run: Run, options: Namespace, began: float, memory: str) -> bool:
    """Train from where a run is, and test; return whether it was not interrupted, nor fell short.

    Collective: every rank of the model's group calls this.
    """
    settings, group, folder = run.settings, run.model.group, Path(options.output)
    reporter = Reporter(group.rank == 0 and not options.quiet)
    reporter.begin(settings, run.parts, run.model, len(run.curve), memory)

    # 2. Training.
    if train(run, options, reporter, began):
        reporter.print(
            f"\n  interrupted after step {len(run.curve)}; --resume continues from there"
        )
        return False

    # 3. Test on images that had no part in training.
    test = _test(run)
    reporter.tested(test, settings.frames)
    if group.size > 1:
        reporter.traffic(_traffic(run))
    files = ["checkpoint", "curve.csv", "curve.png"]
    layer, needles = 0, list[Needle]()
    if isinstance(run.model, Finder):
        clips = run.clips(TEST, _TESTS, (1, settings.frames, _DRAWN))
        layer, needles = find_needles(run.model, clips)
        files.append("needles.png")
    failure = f"--output: cannot write {folder}"
    on_rank_0(lambda: _draw(run, options, layer, needles), failure, group)
    reporter.print(f"  wrote {', '.join(files)} in {folder}")
    reporter.print(f"  total time {time.perf_counter() - began:.1f} s")
    if options.target is not None and test.accuracy < options.target:
        complain(f"{test.accuracy:.1%} of the answers are right, below {options.target:.1%}", group)
        return False
    return True


def _read_images(model: str, group: Group) -> tuple[Images, Images, Images]:
    needed = {"sklearn": "train", "matplotlib": "train"}
    if model == "llama3v":
        needed["transformers"] = "models"
    error = None
    for module, extra in needed.items():
        try:
            import_module(module)
        except ModuleNotFoundError as problem:
            error = InputError(f"{problem}; --model {model} needs pip install '.[{extra}]'")
    raise_together(error, group)
    return load_images()


def _check_schedule(run: Run) -> None:
    """Check before the first step that the schedule supports this number of ranks."""
    clips = run.clips(TRAIN, 0, run.settings.curriculum.shape(0))
    try:
        with torch.no_grad():
            run.model.evaluate(clips)
    except ValueError as error:
        raise InputError(str(error)) from None


@torch.no_grad()
def _test(run: Run) -> Test:
    """Ask about images that had no part in training, nor in deciding when to end it."""
    settings, group = run.settings, run.model.group
    right, asked, images = 0.0, 0, set[int]()
    for n in range(_TESTS):
        clips = run.clips(TEST, n, settings.curriculum.final)
        right += run.model.evaluate(clips)[1]
        asked += clips.total
        images.update(clips.images.flatten().tolist())
    everyone = set[int]().union(*group.allgather(images))
    return Test(int(add_up([right], group)[0]), asked, len(everyone))


def _traffic(run: Run) -> Traffic:
    """Measure the bytes of one step, by the paper's two schedules and by the run's own."""
    clips = run.clips(TRAIN, len(run.curve), run.settings.curriculum.final)
    sent, losses, chosen = {}, [], run.model.schedule
    for schedule in dict.fromkeys(("lv-xattn", "ring", run.model.chosen(clips))):
        run.model.schedule, meter = schedule, Meter()
        loss, _ = run.model.evaluate(clips, meter=meter)
        loss.backward()
        nbytes, whole = add_up([meter.bytes, float(loss.detach())], run.model.group)
        sent[schedule] = int(nbytes)
        losses.append(whole)
    run.model.schedule = chosen
    return Traffic(sent, (max(losses) - min(losses)) / losses[0])


def _draw(run: Run, options: Namespace, layer: int, needles: list[Needle]) -> None:
    # Here, on rank 0 alone, as matplotlib takes long to import.
    from lvxattn.torch_impl.commands.train.draw import draw_curve, draw_needles

    folder, ranks = Path(options.output), run.model.group.size
    title = f"Find the needle in a video of {run.settings.frames:,} frames"
    draw_curve(folder / "curve.png", run.curve, options.target or TARGET, title)
    if needles:
        draw_needles(folder / "needles.png", needles, layer, ranks)
