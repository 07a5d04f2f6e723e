"""The arguments of ``train``, the settings that determine the curve, and the curriculum.

Clips of a thousand frames teach nothing at first: attention spread evenly over them gives the
answer a weight of one thousandth.  So clips begin with two frames and double every `GROW` steps.
Short clips come in larger batches, so that a step sees many images, with fewer questions each.  Of
`Finder`::

    step     0    25    50    75   100   125   150   175   200   225   250
    frames   2     4     8    16    32    64   128   256   512  1024  1200
    clips   64    64    64    64    64    64    32    16     8     4     4
"""

import argparse
from dataclasses import asdict, dataclass, fields
from math import inf

import torch

from lvxattn.cli import InputError
from lvxattn.cli.arguments import between, natural, positive
from lvxattn.common.handshake import AUTO, SCHEDULES
from lvxattn.torch_impl.commands.train.data import BITS

MODELS = {"finder": 0, "llama3v": 75}
"""Further steps with the first clips, by model: Mllama takes longer to learn to see."""

TARGET = 0.95
"""Default share of right answers to train for."""

GROW = 25
"""Steps from one clip length to the next."""

_CLIPS, _FRAMES = 64, 4096
"""Maximum clips, and frames, of a batch of short clips."""

_QUESTIONS = 64
"""Questions about each of the longest clips."""

_RATE, _WARM, _HALF = 3e-3, 20, 60
"""Learning rate; warm-up steps; steps at full length that halve the rate."""


@dataclass(frozen=True)
class Curriculum:
    """Clip lengths, batch sizes and learning rates, as functions of the step's number.

    Attributes
    ----------
    start, frames : int
        Frames of the first and of the longest clips.
    batch : int
        Clips in a batch of the longest ones.
    wait : int
        Steps for which the first clips do not grow.
    """

    start: int
    frames: int
    batch: int
    wait: int = 0

    @property
    def grown(self) -> int:
        """The first step whose clips have their final length."""
        doublings = 0
        while self.start << doublings < self.frames:
            doublings += 1
        return self.wait + GROW * doublings

    def shape(self, step: int) -> tuple[int, int, int]:
        """Return the number of a step's clips, the frames and the questions of each."""
        # Capped first: after thousands of steps the shift would be a huge number.
        doublings = max(0, step - self.wait) // GROW
        frames = self.frames if step >= self.grown else self.start << doublings
        clips = max(self.batch, min(_CLIPS, _FRAMES // frames))
        return clips, frames, max(1, _QUESTIONS * self.batch // clips)

    @property
    def final(self) -> tuple[int, int, int]:
        """The shape of batches of the longest clips."""
        return self.shape(self.grown)

    def rate(self, step: int) -> float:
        """Return a step's learning rate."""
        halvings = max(0, step - self.grown) / _HALF
        return float(_RATE * min(1.0, (step + 1) / _WARM) * 0.5**halvings)


@dataclass(frozen=True)
class Settings:
    """The options that determine the curve: a run can be resumed with the same settings only."""

    frames: int
    first_frames: int
    batch: int
    dtype: str
    seed: int
    model: str = "finder"

    @staticmethod
    def of(options: argparse.Namespace) -> "Settings":
        """Select the settings from the command line.

        Raises
        ------
        InputError
            The settings contradict each other.
        """
        settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
        if settings.first_frames > settings.frames:
            raise InputError(
                f"argument --first-frames: expected at most --frames, {settings.frames}, "
                f"got {settings.first_frames}"
            )
        return settings

    @property
    def curriculum(self) -> Curriculum:
        """The curriculum."""
        return Curriculum(self.first_frames, self.frames, self.batch, MODELS[self.model])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and features."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def difference(self, others: dict[str, object]) -> str | None:
        """Return the first setting that differs in `others`, as text, or None."""
        for name, mine in asdict(self).items():
            if others.get(name) != mine:
                return f"--{name.replace('_', '-')} {others.get(name)!r}, not {mine!r}"
        return None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train`` to a parser."""
    run = parser.add_argument_group("what is trained")
    run.add_argument(
        "--model",
        choices=MODELS,
        default="finder",
        help="two layers of CrossAttention, or a small Llama 3.2 Vision of transformers "
        "(default: %(default)s)",
    )
    run.add_argument(
        "--frames",
        type=_frames,
        default=1200,
        metavar="N",
        help="frames of the longest clips and of the test clips (default: 1200)",
    )
    run.add_argument(
        "--first-frames",
        type=_frames,
        default=2,
        metavar="N",
        help="frames of the first clips; lengths then double (default: 2)",
    )
    run.add_argument(
        "--batch",
        type=positive,
        default=4,
        metavar="N",
        help="clips in a step at full length (default: 4)",
    )
    run.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(default: float32)"
    )
    run.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="selects clips and weights (default: 0)",
    )
    run.add_argument(
        "--schedule",
        choices=(*SCHEDULES, AUTO),
        default=SCHEDULES[0],
        help="what ranks send; auto selects the schedule with the fewest bytes for each clip "
        "length (default: %(default)s)",
    )

    end = parser.add_argument_group("when it ends")
    end.add_argument(
        "--steps", type=positive, default=450, metavar="N", help="limit (default: 450)"
    )
    end.add_argument(
        "--minutes",
        type=between(0, inf, "a number above 0"),
        metavar="X",
        help="limit of this run's time",
    )
    end.add_argument(
        "--target",
        type=between(0, 1, "a share above 0 and below 1"),
        metavar="X",
        help="share of right answers to train for (default: 0.95); if given, a lower share at the "
        "end is exit status 1",
    )

    files = parser.add_argument_group("what is written")
    files.add_argument(
        "--output",
        default="train-run",
        metavar="DIR",
        help="for the checkpoint, the curve and the pictures (default: train-run)",
    )
    files.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")
    files.add_argument(
        "--checkpoint-every", type=positive, default=100, metavar="N", help="steps (default: 100)"
    )
    files.add_argument("--quiet", action="store_true", help="print errors only")


def _frames(text: str) -> int:
    most = 1 << BITS  # markers are distinct
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}, got {text!r}")
    return int(text)
