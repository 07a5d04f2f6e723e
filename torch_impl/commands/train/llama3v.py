"""A small Llama 3.2 Vision, Mllama of transformers with random weights, spread over the ranks.

    frame (8 x 8 pixels, marker) -> an image of one tile     4 patches and a class token
    question (marker)            -> 1 token of text          its embedding is marker W_t
    answer                       -> the token predicted after it, one of ten

    self-attention, cross-attention, self-attention, cross-attention        the layers of the text

Nothing in the model's code knows of ranks.  Every rank makes the whole batch, a few megabytes, and
`Spread.inputs` cuts it: a rank encodes its own frames only, and has its own rows of the text.

An image's first channel is the picture; the second has the marker, 4 x 4 squares of 2 x 2 pixels.
So no patch shows all of either.  The questions about a clip are one text; each is one embedding,
since a marker spelled with several tokens takes far longer to learn.  The gates of cross-attention,
which are closed in a new model, are open here: while they are closed a model learns nothing about
images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from lvxattn.common.meter import Meter
from lvxattn.torch_impl.commands.train.data import BITS, CLASSES, SIDE, Clips
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.models import distribute

PATCH = 4
"""Pixels on each side of a patch."""

E, H, CROSS = 64, 2, (1, 3)
"""Width of the features, heads, layers of cross-attention among twice as many."""


class Llama3v(nn.Module):
    """A model that answers questions about a video sharded over ranks.

    Parameters
    ----------
    group : Group
        The ranks.
    schedule : str
        The schedule of cross-attention.
    """

    part = 0, 1
    """The part of a batch that this rank is given, and the number of parts: all of it."""

    tokens = (SIDE // PATCH) ** 2 + 1
    """Visual tokens of a frame."""

    structure = f"{len(CROSS)} of {2 * len(CROSS)} layers of cross-attention, {H} heads of {E // H}"

    def __init__(self, group: Group, schedule: str = "lv-xattn") -> None:
        super().__init__()
        self.group = group
        self.text = nn.Linear(BITS, E)
        self.llama = _make_mllama()
        self.spread = distribute(self.llama, group, text="sharded", schedule=schedule)

    @property
    def schedule(self) -> str:
        """The schedule of cross-attention."""
        return self.spread.schedule

    @schedule.setter
    def schedule(self, schedule: str) -> None:
        self.spread.schedule = schedule

    def chosen(self, _: Clips) -> str:
        """Return the schedule, which may be ``"auto"``: a layer's choice is its own."""
        return self.schedule

    def evaluate(self, clips: Clips, *, meter: Meter | None = None) -> tuple[Tensor, float]:
        """Return this rank's share of the loss, and its number of right answers.

        Collective: every rank of the group calls this, and its backward.

        Parameters
        ----------
        clips : Clips
            The whole batch.
        meter : Meter, optional
            Counts the messages of all attention, that of the text to itself as well.
        """
        batch = self.spread.inputs(**self.make_batch(clips))
        self.spread.meter = meter
        given = self.llama(**batch)
        labels: Tensor = batch["shift_labels"]
        right = (given.logits.argmax(-1) == labels).sum()
        # The mean of the ranks' losses is that of one process: a P-th of each is a rank's share.
        return given.loss / self.group.size, float(right)

    def make_batch(self, clips: Clips) -> dict[str, Tensor]:
        """Return the model's arguments for a whole batch.

        Parameters
        ----------
        clips : Clips
            The whole batch: B clips of f frames with S_Q questions.

        Returns
        -------
        dict
            ``inputs_embeds``: (B, S, E) with S = S_Q, or the number of ranks if that is larger,
            since each needs a row; ``labels`` and, the tokens that follow each, ``shift_labels``:
            (B, S); ``pixel_values``: (B, f, 1, 3, 8, 8); and two that say that every image has one
            tile.
        """
        B, f = clips.pictures.shape[:2]
        pixels = clips.pictures.new_zeros(B, f, 1, 3, SIDE, SIDE)
        pixels[:, :, 0, 0] = clips.pictures
        squares = clips.markers.unflatten(-1, (SIDE // 2, SIDE // 2))  # (B, f, 4, 4)
        pixels[:, :, 0, 1] = squares.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        # At the end of the text, which sees what is before it, and without answers: no loss.
        more = max(0, self.group.size - clips.shape[2])
        answers = pad(clips.answers, (0, more), value=-100)
        return {
            "inputs_embeds": pad(self.text(clips.questions), (0, 0, 0, more)),
            # Answers are not in the text: one could be copied to a later question about the frame.
            "labels": answers,
            "shift_labels": answers,
            "pixel_values": pixels,
            "aspect_ratio_ids": torch.ones(B, f, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(B, f, 1, dtype=torch.int64),
        }


def _make_mllama() -> MllamaForConditionalGeneration:
    none = CLASSES  # a token that stands for none
    # As transformers 4 names it; 5 takes these names, too.
    rotary: dict[str, Any] = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default"}}
    text = MllamaTextConfig(
        vocab_size=none + 1, pad_token_id=none, bos_token_id=none, eos_token_id=none,
        hidden_size=E, intermediate_size=2 * E, num_attention_heads=H, num_key_value_heads=H,
        num_hidden_layers=2 * len(CROSS), cross_attention_layers=[*CROSS], initializer_range=0.1,
        **rotary,
    )  # fmt: skip
    vision = MllamaVisionConfig(
        image_size=SIDE, patch_size=PATCH, max_num_tiles=1, supported_aspect_ratios=[[1, 1]],
        hidden_size=E, intermediate_size=2 * E, attention_heads=4, num_hidden_layers=2,
        num_global_layers=0, intermediate_layers_indices=[0], vision_output_dim=2 * E,
        initializer_range=0.1,
    )  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    # No tokens are embedded: this weight never has a gradient.
    model.get_input_embeddings().requires_grad_(False)
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
                gate.fill_(1.0)
    return model
