"""A small model that answers questions about a video: patches, cross-attention, an answer.

    frame (8 x 8 pixels, marker) -> 4 patches of 4 x 4    token = pixels W_p + marker W_m + place
    question (marker)            -> 1 token of text       x = marker W_t

    x <- x + attention(norm(x), tokens)                   2 layers: the only place where a question
    x <- x + mlp(norm(x))                                 and the video meet, and where ranks talk
    answer = norm(x) W_a

A token holds a quarter of a picture: no token alone determines a digit, so the heads have to find
all four patches of one frame among thousands of tokens.
"""

from dataclasses import dataclass
from math import sqrt
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lvxattn.common.layout import share
from lvxattn.common.meter import Meter
from lvxattn.torch_impl.commands.train.data import BITS, CLASSES, SIDE, Clips
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout, unshard
from lvxattn.torch_impl.module import CrossAttention

PATCH = 4
"""Pixels on each side of a patch."""

TOKENS = (SIDE // PATCH) ** 2
"""Visual tokens of a frame."""

E, H, D, LAYERS = 64, 4, 32, 2
"""Width of the features, heads, width of a head, layers."""


class Finder(nn.Module):
    """A model that answers questions about a video sharded over ranks.

    Parameters
    ----------
    group : Group
        The ranks that hold the video.
    schedule : str
        The schedule of the attention.

    Attributes
    ----------
    part : (rank, size)
        The part of a batch that the model is given on this rank, and the number of parts.
    tokens : int
        Visual tokens of a frame.
    structure : str
        Describes the layers.
    """

    tokens = TOKENS
    structure = f"{LAYERS} layers of cross-attention, {H} heads of {D}"

    def __init__(self, group: Group, schedule: str = "lv-xattn") -> None:
        super().__init__()
        self.group, self.schedule, self.part = group, schedule, (group.rank, group.size)
        self.pixels = nn.Linear(PATCH * PATCH, E, bias=False)
        self.marker = nn.Linear(BITS, E, bias=False)
        self.place = nn.Parameter(0.5 * torch.randn(TOKENS, E))
        self.norm = nn.LayerNorm(E)
        self.text = nn.Linear(BITS, E)
        self.layers = nn.ModuleList(_Layer(group) for _ in range(LAYERS))
        self.answer = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, CLASSES))
        self._layouts: dict[tuple[str, int, int, int], Layout] = {}

    def forward(
        self, clips: Clips, *, meter: Meter | None = None, seen: list[Tensor] | None = None
    ) -> Tensor:
        """Answer this rank's questions.

        Collective: every rank of the group calls this, and its backward.

        Parameters
        ----------
        clips : Clips
            This rank's frames and questions.
        meter : Meter, optional
            Counts the attention's messages.
        seen : list, optional
            Each layer's query features are appended: (B, s_q, E).

        Returns
        -------
        Tensor : (B, s_q, 10)
            A score for every digit.
        """
        features, x = self.look(clips), self.text(clips.questions)
        layout = self.layout(clips)
        for layer in self.layers:
            x = layer(x, features, layout, self.schedule, meter, seen)
        scores: Tensor = self.answer(x)
        return scores

    def evaluate(self, clips: Clips, *, meter: Meter | None = None) -> tuple[Tensor, float]:
        """Return this rank's share of the loss, and its number of right answers.

        Collective: every rank of the group calls this, and its backward.
        """
        scores = self(clips, meter=meter)
        total = cross_entropy(scores.flatten(0, 1), clips.answers.flatten(), reduction="sum")
        return total / clips.total, float((scores.argmax(-1) == clips.answers).sum())

    def chosen(self, clips: Clips) -> str:
        """Return the schedule that serves these clips.  Collective, as `layout` is."""
        return self.layout(clips).schedule

    def look(self, clips: Clips) -> Tensor:
        """Return the visual tokens of this rank's frames: (B, 4 f, E).  Not collective."""
        B, f = clips.pictures.shape[:2]
        n = SIDE // PATCH
        # (B, f, n, n, PATCH, PATCH)
        patches = clips.pictures.view(B, f, n, PATCH, n, PATCH).transpose(3, 4)
        pixels = patches.reshape(B, f, TOKENS, PATCH * PATCH)  # (B, f, 4, PATCH^2)
        tokens = self.pixels(pixels) + self.marker(clips.markers).unsqueeze(2) + self.place
        features: Tensor = self.norm(tokens.flatten(1, 2))  # (B, 4 f, E)
        return features

    def layout(self, clips: Clips) -> Layout:
        """Return the layout, agreed on once for all layers and all batches of one shape.

        Collective: every rank of the group calls this.

        The key is the whole batch's shape, as agreement is collective: this rank's parts of two
        batches may be equal while another rank's are not.

        Raises
        ------
        ValueError
            The schedule cannot serve so many ranks; the same on all of them.
        """
        key = self.schedule, *clips.shape
        if key not in self._layouts:
            B, s_q, s_kv = *clips.questions.shape[:2], TOKENS * clips.pictures.shape[1]
            q, kv = (clips.questions.new_empty(B, H, s, D) for s in (s_q, s_kv))
            self._layouts[key] = Layout.agree(q, kv, kv, self.group, schedule=self.schedule)
        return self._layouts[key]


class _Layer(nn.Module):
    """Cross-attention from the text to the video, then an MLP for each question."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.attend_norm, self.mlp_norm = nn.LayerNorm(E), nn.LayerNorm(E)
        self.attend = CrossAttention(E, H, head_dim=D, group=group)
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E))

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        layout: Layout,
        schedule: str,
        meter: Meter | None,
        seen: list[Tensor] | None,
    ) -> Tensor:
        asks = self.attend_norm(x)
        if seen is not None:
            seen.append(asks.detach())
        x = x + self.attend(asks, features, layout=layout, schedule=schedule, meter=meter)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


@dataclass(frozen=True)
class Needle:
    """A question, its answer, and the attention to every frame.

    Attributes
    ----------
    marker : (16,), -1 or 1
        The marker asked about.
    picture : (8, 8)
        The picture of the frame with this marker.
    frame, holder : int
        The number of that frame, and the rank that holds it.
    digit, answer : int
        The digit that it shows, and the model's answer.
    weights : (frames,)
        Each frame's share of the attention: the sum over its patches, the mean over heads.
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
    """Answer the questions about the first clip of a batch, and return the attention of each.

    Collective: every rank of the model's group calls this.  Every rank holds the scores of all
    questions: for a few questions only.

    Returns
    -------
    layer : int
        The layer with the largest weights at the right frames, counted from 1.
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
    q = attend.q_proj(everyone).unflatten(-1, (-1, D)).transpose(1, 2)  # (1, H, S_Q, D)
    # (1, H, s_kv, D)
    k = attend.k_proj(model.look(clips)[:1]).unflatten(-1, (-1, D)).transpose(1, 2)
    mine = (q @ k.transpose(2, 3) / sqrt(D)).double()  # (1, H, S_Q, s_kv)
    scores = unshard(mine, model.group, axis=3)  # (1, H, S_Q, S_KV)
    weights = scores.softmax(-1)[0].mean(dim=0)  # (S_Q, S_KV)
    return weights.unflatten(-1, (-1, TOKENS)).sum(-1)  # (S_Q, frames)
