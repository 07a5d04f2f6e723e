"""What ``train`` prints, at most 100 columns wide; on rank 0, and nothing with ``--quiet``."""

import sys
from dataclasses import dataclass
from math import sqrt

from lvxattn.torch_impl.commands.train.curve import Row
from lvxattn.torch_impl.commands.train.data import Images
from lvxattn.torch_impl.commands.train.model import LAYERS, TOKENS, D, Finder, H
from lvxattn.torch_impl.commands.train.options import Settings
from lvxattn.torch_impl.group import Group

_NAMES = {
    "lv-xattn": "LV-XAttn",
    "ring": "Ring Attention",
    "ulysses": "Ulysses",
    "gather": "gather",
}


@dataclass(frozen=True)
class Test:
    """How the questions at the end were answered.

    Attributes
    ----------
    right, questions : int
    images : int
        Different images that they were about.
    """

    right: int
    questions: int
    images: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval.

        Questions about the same image are right or wrong together, or nearly so: what is counted
        are the images.
        """
        n, p, z = self.images, self.accuracy, 1.96
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return centre - half, centre + half


@dataclass(frozen=True)
class Traffic:
    """What one step sent, all ranks together, and what it would have sent another way.

    Attributes
    ----------
    sent : dict
        Bytes by schedule, of one forward and backward through all layers.
    gap : float
        Between the largest of their losses and the smallest, relative.
    """

    sent: dict[str, int]
    gap: float


class Reporter:
    """Says on rank 0 what is going on; the other ranks are silent.

    Parameters
    ----------
    speaks : bool
        Whether this rank is to say anything.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks

    def say(self, text: str) -> None:
        """Print something."""
        if self.speaks:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def begin(
        self, settings: Settings, parts: tuple[Images, Images, Images], model: Finder, done: int
    ) -> None:
        """Say what is to be done."""
        weights = sum(p.numel() for p in model.parameters())
        train, watch, test = (len(part) for part in parts)
        ranks, frames = model.group.size, settings.frames
        growing = f"from {settings.first_frames} frames to {frames:,}"
        self.say(f"""
LV-XAttn training run
  task      find the frame with a given marker and say which digit is written on it
  clips     {growing}, {TOKENS} visual tokens a frame, {settings.batch} clips a step or more
  images    {train:,} to train with, {watch} to watch, {test} to test with; none in two parts
  model     {weights:,} weights in {settings.dtype}, {LAYERS} layers of cross-attention, \
{H} heads of {D}
  ranks     {ranks}, of which each holds {_about(frames, ranks)} of the longest clips
""")
        if done:
            self.say(f"  goes on after step {done}\n")
        self.say("   step   frames  clips     loss    right   held out    seconds")

    def step(self, row: Row, clips: int) -> None:
        """Say what a step came to."""
        step, frames, loss, right, held_out, seconds = (x or 0.0 for x in row)
        self.say(
            f"{step:>7.0f}{frames:>9,.0f}{clips:>7}{loss:>9.3f}{right:>8.1%}{held_out:>10.1%}"
            f"{seconds:>11.1f}"
        )

    def tested(self, test: Test, frames: int) -> None:
        """Say how the questions at the end were answered."""
        low, high = test.interval
        self.say(f"""
  right answers           {test.accuracy:>8.1%}   {test.right:,} of {test.questions:,} questions
    95 % interval       {low:.1%} to {high:.1%}, from {test.images} images
    in clips of         {frames:>8,}   frames, every one of them an image never trained on
""")

    def traffic(self, traffic: Traffic) -> None:
        """Say what one step sent."""
        first = traffic.sent["lv-xattn"]
        for name, nbytes in traffic.sent.items():
            told = "measured, all ranks together"
            if name != "lv-xattn":
                told = f"measured on the same batch: {nbytes / first:.1f} times"
            self.say(f"  sent in a step by {_NAMES[name]:<15} {nbytes / 1e6:>9.2f} MB   {told}")
        self.say(f"  difference of their losses        {traffic.gap:>9.0e}      relative\n")


def complain(text: str, group: Group) -> None:
    """Say on rank 0 what is wrong."""
    if group.rank == 0:
        sys.stderr.write(f"lvxattn train: {text}\n")
        sys.stderr.flush()


def _about(frames: int, ranks: int) -> str:
    least, extra = divmod(frames, ranks)
    return f"{least:,} or {least + 1:,} frames" if extra else f"{least:,} frames"
