"""What a rank asked, what it was answered, and what that took."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Answers:
    """Queries and their answers, one a row.

    Attributes
    ----------
    asker, holder : (n,), int64
        The rank that asked, and the rank that holds the true place.
    truth : (n, 3), int64
        The true place: frame, row, column.
    seen : (n, PATCH, PATCH, 3), uint8
        The noisy patch.
    q : (n, D), float32
        Its descriptor.
    out : (n, 3), float32
        The place that the attention returned.
    lse : (n,), float32
    weight : (n,), float64
        The attention's weight at the true place.
    """

    asker: NDArray[np.int64]
    holder: NDArray[np.int64]
    truth: NDArray[np.int64]
    seen: NDArray[np.uint8]
    q: NDArray[np.float32]
    out: NDArray[np.float32]
    lse: NDArray[np.float32]
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.asker)

    @staticmethod
    def join(parts: Sequence["Answers"]) -> "Answers":
        """Put the answers of several ranks one after another."""
        names = [field.name for field in fields(Answers)]
        return Answers(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Costs:
    """What one rank had to do.

    Attributes
    ----------
    frames, queries, tokens : int
        What it holds.
    messages, sent : int
        What it sent during the attention; `sent` in bytes.
    reading, computing, waiting : float
        Seconds: frames to descriptors, then the attention's two parts.
    """

    frames: int
    queries: int
    tokens: int
    messages: int
    sent: int
    reading: float
    computing: float
    waiting: float
