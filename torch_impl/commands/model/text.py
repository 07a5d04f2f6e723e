"""Made-up text among the frames of a video."""

import torch
from torch import Tensor

from lvxattn.cli.tensors import InputError

# The first tokens are padding, begin and end.
SPECIAL = 3
# What losses ignore.
IGNORED = -100


def check_length(text_tokens: int, most: int, least: int = 3) -> None:
    """Refuse a text that the model has no positions for, or that leaves no token to be learnt.

    Raises
    ------
    InputError
    """
    if not least <= text_tokens <= most:
        raise InputError(
            f"--text-tokens: expected from {least} to {most:,} for this model, got {text_tokens:,}"
        )


def frames_before(frames: int, text_tokens: int) -> Tensor:
    """Return which token sees which frame: the first token none, the second half of the text all.

    Returns
    -------
    (text_tokens, frames), bool
    """
    first = 1 + torch.arange(frames) * (text_tokens // 2) // frames
    return torch.arange(text_tokens)[:, None] >= first


def tokens(table: Tensor, vocabulary: int, image: int) -> tuple[Tensor, Tensor]:
    """Return a random text, with the token `image` wherever new frames are seen.

    Parameters
    ----------
    table : (text_tokens, frames), bool
        As `frames_before` returns it.
    vocabulary, image : int

    Returns
    -------
    ids : (1, text_tokens)
    images : (1, text_tokens), bool
        Where frames are.
    """
    seen = table.sum(1)
    images = torch.diff(seen, prepend=seen.new_zeros(1)) > 0
    ids = torch.randint(SPECIAL, vocabulary, (1, len(table)))
    return ids.masked_fill(images, image), images[None]


def labels_of(ids: Tensor, images: Tensor) -> Tensor:
    """Return the text as labels, but for the frames in it."""
    return ids.masked_fill(images, IGNORED)
