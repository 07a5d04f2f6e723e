"""How clips grow, and how large the steps are; all of it follows from the number of the step.

From clips of a thousand frames nothing is learnt at first: attention that looks everywhere alike
sees a thousandth of the answer.  So clips begin with two frames, where such a look is half right,
and double every `GROW` steps.  While they are short there are more of them in a batch, for a step
to see many images, and fewer questions about each::

    step     0    25    50    75   100   125   150   175   200   225   250
    frames   2     4     8    16    32    64   128   256   512  1024  1200
    clips   64    64    64    64    64    64    32    16     8     4     4
"""

from dataclasses import dataclass

GROW = 25
"""Steps from one clip length to the next."""

_CLIPS, _FRAMES = 64, 4096
"""Clips in a batch at most, and frames in it, as long as clips are short."""

_QUESTIONS = 64
"""Questions about each of the longest clips."""

_RATE, _WARM, _HALF = 3e-3, 20, 60
"""AdamW's step; the steps that it takes to get there; the full-length steps that halve it."""


@dataclass(frozen=True)
class Curriculum:
    """What every step trains on.

    Attributes
    ----------
    start, frames : int
        Frames of the first clips, and of those that they grow to.
    batch : int
        Clips in a batch when they are longest.
    """

    start: int
    frames: int
    batch: int

    @property
    def grown(self) -> int:
        """The first step whose clips have their final length."""
        doublings = 0
        while self.start << doublings < self.frames:
            doublings += 1
        return GROW * doublings

    def shape(self, step: int) -> tuple[int, int, int]:
        """Return a step's clips, the frames of each, and the questions about each."""
        # Capped before it is shifted: a shift by thousands of steps would be a giant.
        frames = self.frames if step >= self.grown else self.start << step // GROW
        clips = max(self.batch, min(_CLIPS, _FRAMES // frames))
        return clips, frames, max(1, _QUESTIONS * self.batch // clips)

    @property
    def final(self) -> tuple[int, int, int]:
        """The shape of the longest clips' batches."""
        return self.shape(self.grown)

    def rate(self, step: int) -> float:
        """Return a step's learning rate."""
        halvings = max(0, step - self.grown) / _HALF
        return float(_RATE * min(1.0, (step + 1) / _WARM) * 0.5**halvings)
