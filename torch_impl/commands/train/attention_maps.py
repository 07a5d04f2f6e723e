"""Where the attention looked: a few questions about a clip, and the weight of every frame."""

from dataclasses import dataclass
from math import sqrt
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvxattn.common.layout import share
from lvxattn.torch_impl.commands.train.data import Clips
from lvxattn.torch_impl.commands.train.model import TOKENS, D, Finder
from lvxattn.torch_impl.layout import unshard
from lvxattn.torch_impl.module import CrossAttention


@dataclass(frozen=True)
class Needle:
    """A question, and how it was answered.

    Attributes
    ----------
    marker : (16,), -1 or 1
        What was asked about.
    picture : (8, 8)
        The frame that bears it.
    frame, holder : int
        Its number, and the rank that held it.
    digit, answer : int
        What it shows, and what the model said.
    weights : (frames,)
        Share of the attention that each frame got: over all patches, the mean over heads.
    """

    marker: NDArray[np.float64]
    picture: NDArray[np.float64]
    frame: int
    holder: int
    digit: int
    answer: int
    weights: NDArray[np.float64]


@torch.no_grad()
def find_needles(model: Finder, clips: Clips) -> tuple[int, list[Needle]]:
    """Answer the questions about the first clip of a batch, and look where the model looks.

    Collective: every rank of the model's group calls this.  Every rank holds the scores of all
    questions for a moment, which is for a few questions only.

    Returns
    -------
    layer : int
        The layer that looks hardest at the right frames, counted from 1.
    needles : list of Needle
        The same on all ranks.
    """
    group, seen = model.group, list[Tensor]()
    answers = unshard(model(clips, seen=seen).argmax(-1), group, axis=1)[0]
    asked = unshard(clips.asked, group, axis=1)[0]
    by_layer = torch.stack([_weights(model, i, asks, clips) for i, asks in enumerate(seen)])
    right = by_layer[:, torch.arange(len(asked)), asked].mean(dim=1)
    layer = int(right.argmax())
    pictures = unshard(clips.pictures, group, axis=1)[0]
    markers = unshard(clips.questions, group, axis=1)[0]
    digits = unshard(clips.answers, group, axis=1)[0]
    ends = [share(clips.shape[1], rank, group.size).stop for rank in range(group.size)]
    needles = [
        Needle(
            marker=markers[n].double().numpy(),
            picture=pictures[frame].double().numpy(),
            frame=frame,
            holder=sum(frame >= end for end in ends),
            digit=int(digits[n]),
            answer=int(answers[n]),
            weights=by_layer[layer, n].numpy(),
        )
        for n, frame in enumerate(asked.tolist())
    ]
    return layer + 1, needles


def _weights(model: Finder, layer: int, asks: Tensor, clips: Clips) -> Tensor:
    """Return the weight of every frame for every question about the first clip: (S_Q, frames)."""
    attend = cast(CrossAttention, model.layers[layer].attend)
    everyone = unshard(asks, model.group, axis=1)[:1]
    q = attend.q_proj(everyone).unflatten(-1, (-1, D)).transpose(1, 2)
    k = attend.k_proj(model.look(clips)[:1]).unflatten(-1, (-1, D)).transpose(1, 2)
    mine = (q @ k.transpose(2, 3) / sqrt(D)).double()  # (1, H, S_Q, s_kv)
    scores = unshard(mine, model.group, axis=3)
    weights = scores.softmax(-1)[0].mean(dim=0)
    return weights.unflatten(-1, (-1, TOKENS)).sum(-1)
