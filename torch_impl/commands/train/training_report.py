"""The curve, and the text of ``train``: at most 100 columns wide, on rank 0 unless ``--quiet``."""

import sys
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from lvxattn.common.new_file import write_file
from lvxattn.torch_impl.commands.train.data import Images
from lvxattn.torch_impl.commands.train.model import Finder
from lvxattn.torch_impl.commands.train.options import Settings
from lvxattn.torch_impl.group import Group

if TYPE_CHECKING:
    from lvxattn.torch_impl.commands.train.llama3v import Llama3v

Row = list[float | None]
"""A row of `Curve`."""

COLUMNS = "step", "frames", "loss", "accuracy", "held_out", "seconds"

_NAMES = {
    "lv-xattn": "LV-XAttn",
    "ring": "Ring Attention",
    "grid": "a grid",
    "ulysses": "Ulysses",
    "gather": "gather",
    "auto": "auto",
}


@dataclass
class Curve:
    """One row for each step.

    Attributes
    ----------
    rows : list
        ``step``, counted from 1; ``frames`` of its clips; ``loss`` in nats and ``accuracy`` before
        the step, over all ranks' questions; ``held_out``, accuracy after it on images not trained
        on, or None without a look; ``seconds`` that all steps and looks so far took.
    """

    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.rows)

    def column(self, name: str) -> list[float | None]:
        """Return one column."""
        return [row[COLUMNS.index(name)] for row in self.rows]

    @property
    def seconds(self) -> float:
        """Time of all steps so far."""
        return float(self.rows[-1][5] or 0.0) if self.rows else 0.0

    def write(self, path: Path) -> None:
        """Write the table as CSV.

        Raises
        ------
        OSError
        """
        # repr writes every digit: float64 curves are compared by this file.
        lines = [",".join(COLUMNS)]
        lines += [",".join("" if x is None else repr(x) for x in row) for row in self.rows]
        write_file(path, "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Test:
    """The result of the test.

    Attributes
    ----------
    right, questions : int
    images : int
        Number of different images that they ask about.
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

        Its sample size is the number of images, as questions about one image are answered alike.
        """
        n, p, z = self.images, self.accuracy, 1.96
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return centre - half, centre + half


@dataclass(frozen=True)
class Traffic:
    """Bytes sent in one step by all ranks together, by several schedules.

    Attributes
    ----------
    sent : dict
        Bytes by schedule, of a forward and backward through all layers.
    gap : float
        Relative difference of the largest and the smallest of their losses.
    """

    sent: dict[str, int]
    gap: float


class Reporter:
    """Prints the report on one rank.

    Parameters
    ----------
    speaks : bool
        Whether this rank prints.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks

    def print(self, text: str) -> None:
        """Print a text."""
        if self.speaks:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def begin(
        self,
        settings: Settings,
        parts: tuple[Images, Images, Images],
        model: "Finder | Llama3v",
        done: int,
        memory: str,
    ) -> None:
        """Print the task's sizes."""
        weights = sum(p.numel() for p in model.parameters())
        train, watch, test = (len(part) for part in parts)
        ranks, frames = model.group.size, settings.frames
        growing = f"from {settings.first_frames} frames to {frames:,}, {model.tokens} visual tokens"
        self.print(f"""
LV-XAttn training run
  task      find the frame with a given marker and name the digit on it
  clips     {growing} per frame, {settings.batch} clips per step or more
  images    {train:,} to train with, {watch} to watch, {test} to test with; none in two parts
  model     {settings.model}, {weights:,} weights in {settings.dtype}, {model.structure}
  ranks     {ranks}, each with {_about(frames, ranks)} of the longest clips
  memory    at least {memory}
""")
        if done:
            self.print(f"  resumed after step {done}\n")
        self.print("   step   frames  clips     loss    right   held out    seconds")

    def step(self, row: Row, clips: int) -> None:
        """Print a step's row of the curve."""
        step, frames, loss, right, held_out, seconds = (x or 0.0 for x in row)
        self.print(
            f"{step:>7.0f}{frames:>9,.0f}{clips:>7}{loss:>9.3f}{right:>8.1%}{held_out:>10.1%}"
            f"{seconds:>11.1f}"
        )

    def tested(self, test: Test, frames: int) -> None:
        """Print the result of the test."""
        low, high = test.interval
        self.print(f"""
  right answers           {test.accuracy:>8.1%}   {test.right:,} of {test.questions:,} questions
    95 % interval       {low:.1%} to {high:.1%}, from {test.images} images
    in clips of         {frames:>8,}   frames, every one of them an image never trained on
""")

    def traffic(self, traffic: Traffic) -> None:
        """Print the bytes sent in a step."""
        first = traffic.sent["lv-xattn"]
        for name, nbytes in traffic.sent.items():
            told = "measured, all ranks together"
            if name != "lv-xattn":
                told = f"measured on the same batch: {nbytes / first:.1f} times"
            self.print(f"  sent in a step by {_NAMES[name]:<15} {nbytes / 1e6:>9.2f} MB   {told}")
        self.print(f"  difference of their losses        {traffic.gap:>9.0e}      relative\n")


def complain(text: str, group: Group) -> None:
    """Print an error on rank 0."""
    if group.rank == 0:
        sys.stderr.write(f"lvxattn train: {text}\n")
        sys.stderr.flush()


def _about(frames: int, ranks: int) -> str:
    least, extra = divmod(frames, ranks)
    return f"{least:,} or {least + 1:,} frames" if extra else f"{least:,} frames"
