"""What the picture shows: decided before anything is drawn, and without the drawing library."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lvxattn.cli.arguments import try_to_write
from lvxattn.mpi_impl.commands.demo.answers import Answers
from lvxattn.mpi_impl.commands.demo.judge import FOUND

ROWS, COLS = 3, 3
"""Examples from top to bottom, and side by side."""

_FILM = 18  # pictures; a short video shows some of its frames more than once
_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def check_output(path: Path) -> None:
    """Check that a picture can be written to a file.

    Raises
    ------
    ValueError
        If it cannot.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the picture: expected matplotlib, which draws it; it is not installed "
            "(pip install matplotlib)"
        )
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--output: expected a name in {' '.join(_SUFFIXES)}; got {path}")
    try:
        if path.is_dir() or not path.parent.is_dir():
            problem = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise ValueError(
                f"--output: expected a file in a folder that exists; got {path}: {problem}"
            )
        try_to_write(path)
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written: {error.strerror}") from None


def choose_examples(answers: Answers, verdicts: Sequence[str]) -> list[int]:
    """Choose answers to show, spread over the video and the askers; the last is one not found.

    Parameters
    ----------
    answers : Answers
        Of all ranks.
    verdicts : sequence of str
        One for each answer.

    Returns
    -------
    list of int
        Numbers of answers, at most ``ROWS * COLS``.
    """
    found = [n for n, verdict in enumerate(verdicts) if verdict == FOUND]
    other = [n for n, verdict in enumerate(verdicts) if verdict != FOUND]
    found.sort(key=lambda n: int(answers.truth[n, 0]))
    parts = min(len(found), ROWS * COLS - bool(other))
    texture = answers.seen.mean(axis=-1).std(axis=(1, 2))
    chosen: list[int] = []
    for part in range(parts):  # of each part of the video, the asker shown least, then most texture
        share = np.array(found[part * len(found) // parts : (part + 1) * len(found) // parts])
        shown = [int((answers.asker[chosen] == answers.asker[n]).sum()) for n in share]
        chosen.append(int(share[np.lexsort((-texture[share], shown))[0]]))
    return chosen + other[: ROWS * COLS - parts if not chosen else 1]


def frames_to_draw(answers: Answers, examples: Sequence[int], frames: int) -> list[int]:
    """List the numbers of the frames that the picture shows, ascending."""
    return sorted({*film_frames(frames), *(int(answers.truth[n, 0]) for n in examples)})


def film_frames(frames: int) -> list[int]:
    """Give the number of the middle frame of each part of the film."""
    return [(2 * n + 1) * frames // (2 * _FILM) for n in range(_FILM)]
