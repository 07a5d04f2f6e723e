"""OpenFlamingo of its own package: a token sees the last frame before it."""

import sys
import types
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.commands.model.text import check_length, frames_before, labels_of, tokens


def build(size: str, frames: int, text_tokens: int) -> nn.Module:  # noqa: ARG001 - of any length
    """Return a model of random weights: an MPT, and a CLIP of transformers."""
    # The package imports open_clip, which is not needed here.
    if "open_clip" not in sys.modules and not find_spec("open_clip"):
        sys.modules["open_clip"] = types.ModuleType("open_clip")
    from open_flamingo.src.flamingo import Flamingo
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.utils import extend_instance
    from transformers import CLIPVisionConfig, MptConfig, MptForCausalLM

    # Width, layers, heads, vocabulary; of the vision tower its width, layers, heads, image, patch.
    text, vision, every = {
        "tiny": ((64, 4, 4, 128), (32, 2, 2, 16, 4), 2),
        "small": ((512, 8, 8, 8192), (384, 6, 6, 112, 14), 4),
        "full": ((4096, 32, 32, 50280), (1024, 24, 16, 224, 14), 4),  # 9B: MPT-7B and ViT-L/14
    }[size]
    wide, layers, heads, side, patch = vision
    language: Any = MptForCausalLM(
        MptConfig(
            d_model=text[0], n_layers=text[1], n_heads=text[2], vocab_size=text[3],
            max_seq_len=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    extend_instance(language, FlamingoLMMixin)
    language.set_decoder_layers_attr_name("transformer.blocks")
    tower = Tower(
        CLIPVisionConfig(
            hidden_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * wide, image_size=side, patch_size=patch,
        )
    )  # fmt: skip
    image = text[3] - 1
    model: nn.Module = Flamingo(
        types.SimpleNamespace(visual=tower), language, 2, image, wide, every
    )
    return model


def batch(model: Any, frames: int, text_tokens: int) -> dict[str, Tensor]:
    """Return a batch of one video; each frame has a token of its own in the text."""
    config = model.lang_encoder.config
    # Each frame has a token of its own, in the first half of the text.
    check_length(text_tokens, config.max_seq_len, least=max(3, 2 * frames))
    ids, images = tokens(
        frames_before(frames, text_tokens), config.vocab_size - 1, model.media_token_id
    )
    mask = torch.ones_like(ids)
    # generate drops a mask that hides nothing, and the package insists on one.  Of the first token
    # it would leave a row without keys, which becomes NaN in float64.
    mask[:, -1] = 0
    side = model.vision_encoder.config.image_size
    return {
        "vision_x": torch.randn(1, frames, 1, 3, side, side),
        "lang_x": ids,
        "attention_mask": mask,
        "labels": labels_of(ids, images),
    }


class Tower(nn.Module):
    """A CLIP of transformers in the form of open_clip's: a pooled vector, and the patches."""

    def __init__(self, config: Any) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        self.config = config
        self.model = CLIPVisionModel(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, width) and (N, patches, width)."""
        found = self.model(pixel_values=x)
        return found.pooler_output, found.last_hidden_state[:, 1:]
