"""Training: steps, with looks at held-out images and checkpoints, until the goal is reached.

Each rank answers its own questions from all ranks' frames.  Its loss is its share of the batch's:

    loss = sum over its questions of -log p(answer) / all ranks' questions

so that the sum of all ranks' gradients is the gradient of one process that holds everything, and
AdamW, which is given the same sum everywhere, takes the same step everywhere.
"""

import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from lvxattn.torch_impl.commands.processes import on_rank_0
from lvxattn.torch_impl.commands.train import checkpoint
from lvxattn.torch_impl.commands.train.data import TRAIN, WATCH, Clips, Images, make_clips
from lvxattn.torch_impl.commands.train.model import Finder
from lvxattn.torch_impl.commands.train.options import TARGET, Settings
from lvxattn.torch_impl.commands.train.training_report import Curve, Reporter
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.module import sum_gradients

if TYPE_CHECKING:
    from lvxattn.torch_impl.commands.train.llama3v import Llama3v

LOOK_EVERY = 25
"""Steps between looks at held-out images."""

_DECAY, _BETAS, _LONGEST = 0.3, (0.9, 0.99), 1.0
"""AdamW's weight decay and betas, and the norm to which gradients are clipped."""


@dataclass
class Run:
    """The state of a run.

    Attributes
    ----------
    settings : Settings
    parts : tuple of Images
        To train with, to watch, to test with.
    model : Finder or Llama3v
    optimizer : torch.optim.AdamW
    curve : Curve
        One row for each step so far.
    """

    settings: Settings
    parts: tuple[Images, Images, Images]
    model: "Finder | Llama3v"
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
            model = make_model(settings, group, schedule).to(settings.torch_dtype)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, betas=_BETAS, weight_decay=_DECAY
        )  # the learning rate is set before every step
        return Run(settings, parts, model, optimizer, Curve())

    def clips(self, purpose: int, step: int, shape: tuple[int, int, int]) -> Clips:
        """Make this rank's part of a batch."""
        key, dtype = (self.settings.seed, purpose, step), self.settings.torch_dtype
        return make_clips(self.parts[purpose], key, shape, *self.model.part, dtype)

    def step(self, told: tuple[bool, ...] = ()) -> list[bool]:
        """Learn from one more batch.

        Collective: every rank of the group calls this.

        Parameters
        ----------
        told : tuple of bool
            Flags of this rank, such as a request to stop; equally many on all ranks.

        Returns
        -------
        list of bool
            Which flags any rank has set; the same on all ranks.
        """
        step, curriculum, began = len(self.curve), self.settings.curriculum, time.perf_counter()
        clips = self.clips(TRAIN, step, curriculum.shape(step))
        loss, right = self.model.evaluate(clips)
        self.optimizer.zero_grad()
        loss.backward()
        # 1. Until here gradients are this rank's part; from here on they are the same everywhere.
        sum_gradients(self.model, self.model.group)
        clip_grad_norm_(self.model.parameters(), _LONGEST)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = curriculum.rate(step)
        self.optimizer.step()
        # 2. Loss, right answers and flags travel in one message.
        mine = [float(loss.detach()), right, *map(float, told)]
        whole, found, *flags = add_up(mine, self.model.group)
        seconds = self.curve.seconds + time.perf_counter() - began
        row = [step + 1, clips.shape[1], whole, found / clips.total, None, seconds]
        self.curve.rows.append(row)
        return [n > 0 for n in flags]

    @torch.no_grad()
    def look(self) -> None:
        """Measure accuracy on held-out images, on clips of the last step's length.

        Collective: every rank of the group calls this.
        """
        step, began = len(self.curve), time.perf_counter()
        clips = self.clips(WATCH, step, self.settings.curriculum.shape(step - 1))
        (right,) = add_up([self.model.evaluate(clips)[1]], self.model.group)
        seconds = self.curve.seconds + time.perf_counter() - began
        self.curve.rows[-1][4:] = right / clips.total, seconds

    def done(self, steps: int, goal: float) -> bool:
        """Return whether all steps are done, or two looks in a row, at full length, met `goal`."""
        if len(self.curve) >= steps:
            return True
        grown = self.settings.curriculum.grown
        looks = [row[4] for row in self.curve.rows[grown:] if row[4] is not None]
        return len(looks) >= 2 and min(looks[-2:]) >= goal


def train(run: Run, options: Namespace, reporter: Reporter, began: float) -> bool:
    """Train until the goal is reached, and write the checkpoint and the curve.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    run : Run
    options : argparse.Namespace
    reporter : Reporter
    began : float
        The start, by `time.perf_counter`, from which ``--minutes`` counts.

    Returns
    -------
    bool
        Whether the run was interrupted before that; the same on all ranks.
    """
    folder, curve, saved = Path(options.output), run.curve, len(run.curve)
    limit = float("inf") if options.minutes is None else 60 * options.minutes
    # Held-out images end the training, test images count.  The first are few: the goal for them is
    # half-way from the target to 1.
    goal = (1 + (options.target or TARGET)) / 2
    late = interrupted = False
    with _signals() as received:
        while not (late or interrupted or run.done(options.steps, goal)):
            # Clocks differ, and signals arrive at any time: all ranks act on what one reports.
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
    group, file = run.model.group, folder / "curve.csv"
    checkpoint.save(folder, run.model, run.optimizer, run.curve, run.settings, group)
    on_rank_0(lambda: run.curve.write(file), f"cannot write {file}", group)


def make_model(settings: Settings, group: Group, schedule: str) -> "Finder | Llama3v":
    """Return the model that the settings name, of the random weights that are due."""
    if settings.model == "finder":
        return Finder(group, schedule)
    # Here, since transformers takes seconds to import, and need not be installed for the other.
    from lvxattn.torch_impl.commands.train.llama3v import Llama3v

    return Llama3v(group, schedule)


def add_up(numbers: list[float], group: Group) -> list[float]:
    """Add up numbers over the ranks.  Collective: every rank of the group calls this."""
    if group.size == 1:
        return numbers
    summed = torch.tensor(numbers, dtype=torch.float64)
    with group.waiting(lambda: "all ranks' losses"):
        dist.all_reduce(summed, dist.ReduceOp.SUM, group.group)
    return list(summed.tolist())


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that interrupt a program, so that it can end cleanly."""
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
