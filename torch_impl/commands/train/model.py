"""A small model that answers questions about a video: patches, cross-attention, an answer.

    frame (8 x 8 pixels, marker) -> 4 patches of 4 x 4    token = pixels W_p + marker W_m + place
    question (marker)            -> 1 token of text       x = marker W_t

    x <- x + attention(norm(x), tokens)                   2 layers: the only place where a question
    x <- x + mlp(norm(x))                                 and the video meet, and where ranks talk
    answer = norm(x) W_a

A token shows a quarter of a picture: no token tells a digit, and to put it together the heads have
to find all four patches of one frame among thousands of tokens.
"""

import torch
from torch import Tensor, nn

from lvxattn.common.meter import Meter
from lvxattn.torch_impl.commands.train.data import BITS, CLASSES, SIDE, Clips
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout
from lvxattn.torch_impl.module import CrossAttention

PATCH = 4
"""Pixels on each side of a patch."""

TOKENS = (SIDE // PATCH) ** 2
"""Visual tokens that a frame becomes."""

E, H, D, LAYERS = 64, 4, 32, 2
"""Width of the features, heads, width of a head, layers."""


class Finder(nn.Module):
    """Answers questions about a video that is spread over ranks.

    Parameters
    ----------
    group : Group
        The ranks that hold the video.
    schedule : str
        What travels between them.
    """

    def __init__(self, group: Group, schedule: str = "lv-xattn") -> None:
        super().__init__()
        self.group, self.schedule = group, schedule
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
            Counts what the attention sends.
        seen : list, optional
            Is given what each layer's attention is asked: (B, s_q, E).

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

    def look(self, clips: Clips) -> Tensor:
        """Return the visual tokens of this rank's frames: (B, 4 f, E).  Not collective."""
        B, f = clips.pictures.shape[:2]
        n = SIDE // PATCH
        patches = clips.pictures.view(B, f, n, PATCH, n, PATCH).transpose(3, 4)
        pixels = patches.reshape(B, f, TOKENS, PATCH * PATCH)
        tokens = self.pixels(pixels) + self.marker(clips.markers).unsqueeze(2) + self.place
        features: Tensor = self.norm(tokens.flatten(1, 2))
        return features

    def layout(self, clips: Clips) -> Layout:
        """Agree on who holds what: once for all layers and all batches of one shape.

        Collective: every rank of the group calls this.

        The shape is the whole batch's: this rank's part of two batches may be the same and another
        rank's not, and either all ranks agree anew or none.

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
    """Attention from the text to the video, then a layer of plain neurons for each question."""

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
