"""Training until it is enough, with a checkpoint now and then."""

import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvxattn.cli import InputError
from lvxattn.common.validation import raise_together
from lvxattn.torch_impl.commands.train.curve import Curve
from lvxattn.torch_impl.commands.train.data import TRAIN, WATCH, Clips, Images, make_clips
from lvxattn.torch_impl.commands.train.model import Finder
from lvxattn.torch_impl.commands.train.options import TARGET, Settings
from lvxattn.torch_impl.commands.train.report import Reporter
from lvxattn.torch_impl.commands.train.step import look, make_optimizer, train_step
from lvxattn.torch_impl.group import Group

LOOK_EVERY = 25
"""Steps between looks at held-out images."""


@dataclass
class Run:
    """A run as it stands.

    Attributes
    ----------
    settings : Settings
    parts : tuple of Images
        To train with, to watch, to test with.
    model : Finder
    optimizer : torch.optim.AdamW
    curve : Curve
        One row for each step that has been done.
    """

    settings: Settings
    parts: tuple[Images, Images, Images]
    model: Finder
    optimizer: torch.optim.AdamW
    curve: Curve

    @staticmethod
    def begin(
        settings: Settings,
        parts: tuple[Images, Images, Images],
        group: Group,
        schedule: str = "lv-xattn",
    ) -> "Run":
        """Return a run before its first step, with the same weights on all ranks."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            # Made in float32, so that a run in float64 begins with the same weights.
            model = Finder(group, schedule).to(settings.torch_dtype)
        return Run(settings, parts, model, make_optimizer(model), Curve())

    def clips(self, purpose: int, step: int, shape: tuple[int, int, int]) -> Clips:
        """Make this rank's part of a batch."""
        group, key = self.model.group, (self.settings.seed, purpose, step)
        images, dtype = self.parts[purpose], self.settings.torch_dtype
        return make_clips(images, key, shape, group.rank, group.size, dtype)

    def step(self, told: tuple[bool, ...] = ()) -> list[bool]:
        """Learn from one batch more.

        Collective: every rank of the group calls this.  `told` is as in `train_step`.
        """
        step, curriculum, began = len(self.curve), self.settings.curriculum, time.perf_counter()
        clips = self.clips(TRAIN, step, curriculum.shape(step))
        rate = curriculum.rate(step)
        loss, right, heard = train_step(self.model, self.optimizer, clips, rate, told)
        seconds = self.curve.seconds + time.perf_counter() - began
        self.curve.add(clips.shape[1], loss, right, seconds)
        return heard

    def look(self) -> None:
        """See how it does on clips of the last step's length, of images that are watched only.

        Collective: every rank of the group calls this.
        """
        step, began = len(self.curve), time.perf_counter()
        clips = self.clips(WATCH, step, self.settings.curriculum.shape(step - 1))
        held_out = look(self.model, clips)
        self.curve.looked(held_out, time.perf_counter() - began)

    def done(self, steps: int, goal: float) -> bool:
        """Whether all steps are done, or two looks in a row at the longest clips were enough."""
        if len(self.curve) >= steps:
            return True
        grown = self.settings.curriculum.grown
        looks = [row[4] for row in self.curve.rows[grown:] if row[4] is not None]
        return len(looks) >= 2 and min(looks[-2:]) >= goal


def train(run: Run, options: Namespace, reporter: Reporter, began: float) -> bool:
    """Train until it is enough, and leave a checkpoint and the curve.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    run : Run
    options : argparse.Namespace
    reporter : Reporter
    began : float
        When, by `time.perf_counter`, the minutes began to count.

    Returns
    -------
    bool
        Whether it was interrupted before that; the same on all ranks.
    """
    folder, curve, saved = Path(options.output), run.curve, len(run.curve)
    limit = float("inf") if options.minutes is None else 60 * options.minutes
    # What ends the training are a few questions about a few images; what counts are others.  So it
    # has to come half the way from the target to all right.
    goal = (1 + (options.target or TARGET)) / 2
    late = interrupted = False
    with _signals() as received:
        while not (late or interrupted or run.done(options.steps, goal)):
            # Clocks differ, and signals come when they will: what one rank hears, all hear.
            told = time.perf_counter() - began > limit, bool(received)
            late, interrupted = run.step(told)
            if len(curve) % LOOK_EVERY == 0 or len(curve) == options.steps or late:
                run.look()
                reporter.step(curve.rows[-1], run.settings.curriculum.shape(len(curve) - 1)[0])
            if len(curve) % options.checkpoint_every == 0:
                save(run, folder)
                saved = len(curve)
        if saved != len(curve) or not curve.rows:
            save(run, folder)
    return interrupted


def save(run: Run, folder: Path) -> None:
    """Write the checkpoint and the curve.

    Collective: every rank of the group calls this.

    Raises
    ------
    InputError
        They cannot be written; the same on all ranks.
    """
    group, error = run.model.group, None
    # Here, since it takes seconds to import, and steps need none of it.
    from lvxattn.torch_impl.commands.train import checkpoint

    checkpoint.save(folder, run.model, run.optimizer, run.curve, run.settings, group)
    if group.rank == 0:
        try:
            run.curve.write(folder / "curve.csv")
        except OSError as problem:
            error = InputError(f"cannot write {folder / 'curve.csv'}: {problem.strerror}")
    raise_together(error, group)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask a program to end, so that it can end well."""
    received: list[int] = []

    def collect(number: int, _: Any) -> None:
        received.append(number)

    wanted = signal.SIGINT, signal.SIGTERM
    try:
        before = {number: signal.signal(number, collect) for number in wanted}
    except ValueError:  # signals reach a program's main thread only
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
