"""The arguments of ``train``, and what of them shapes the curve."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch

from lvxattn.cli import InputError
from lvxattn.common.handshake import AUTO, SCHEDULES
from lvxattn.torch_impl.commands.train.curriculum import Curriculum
from lvxattn.torch_impl.commands.train.data import BITS

TARGET = 0.95
"""Share of right answers that a run trains for, unless told otherwise."""


@dataclass(frozen=True)
class Settings:
    """What shapes the curve: a run can be resumed with the same settings only."""

    frames: int
    first_frames: int
    batch: int
    dtype: str
    seed: int

    @staticmethod
    def of(options: argparse.Namespace) -> "Settings":
        """Pick them from the command line.

        Raises
        ------
        InputError
            They do not go together.
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
        """What every step trains on."""
        return Curriculum(self.first_frames, self.frames, self.batch)

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def difference(self, others: dict[str, object]) -> str | None:
        """Say which setting is another one in `others`, if any."""
        for name, mine in asdict(self).items():
            if others.get(name) != mine:
                return f"--{name.replace('_', '-')} {others.get(name)}, not {mine}"
        return None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train`` to a parser."""
    run = parser.add_argument_group("what is trained")
    run.add_argument(
        "--frames",
        type=_count(1, 1 << BITS),
        default=1200,
        metavar="N",
        help="of the longest clips, and of those it is tested with (default: 1200)",
    )
    run.add_argument(
        "--first-frames",
        type=_count(1, 1 << BITS),
        default=2,
        metavar="N",
        help="frames of the first clips, which then double (default: 2)",
    )
    run.add_argument(
        "--batch",
        type=_count(1),
        default=4,
        metavar="N",
        help="clips in a step, of the longest (default: 4)",
    )
    run.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(default: float32)"
    )
    run.add_argument(
        "--seed", type=_count(0), default=0, metavar="N", help="other clips, other weights"
    )
    run.add_argument(
        "--schedule",
        choices=(*SCHEDULES, AUTO),
        default=SCHEDULES[0],
        help="what travels between ranks; auto takes what sends the fewest bytes for clips of a "
        "length (default: %(default)s)",
    )

    end = parser.add_argument_group("when it ends")
    end.add_argument(
        "--steps", type=_count(1), default=450, metavar="N", help="at the latest (default: 450)"
    )
    end.add_argument("--minutes", type=_above_0, metavar="X", help="at the latest, of this run")
    end.add_argument(
        "--target",
        type=_share,
        metavar="X",
        help="train for this share of right answers (default: 0.95); given, exit status 1 if "
        "they fall short of it",
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
        "--checkpoint-every", type=_count(1), default=100, metavar="N", help="steps (default: 100)"
    )
    files.add_argument("--quiet", action="store_true", help="print errors only")


def _count(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a whole number within bounds."""
    bounds = f"{least} up" if most is None else f"{least} to {most}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"expected a whole number from {bounds}, got {text!r}")
        return number

    return read


def _above_0(text: str) -> float:
    return _real(text, float("inf"), "a number above 0")


def _share(text: str) -> float:
    return _real(text, 1.0, "a share above 0 and below 1")


def _real(text: str, below: float, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < below:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number
