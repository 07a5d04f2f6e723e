"""mPLUG-Owl3, version 241101: one softmax over text and the frames up to a token's own."""

from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.commands.model.text import check_length, frames_before, labels_of, tokens


def build(size: str, frames: int, text_tokens: int) -> nn.Module:  # noqa: ARG001 - of any length
    """Return a model of random weights."""
    from transformers import Qwen2Config, SiglipVisionConfig

    from lvxattn.torch_impl.models.owl3 import Owl3, Owl3Config

    # Width, MLP, layers, heads, key-value heads, vocabulary; of SigLIP: width, MLP, layers, heads,
    # image, patch; and the layers with hyper attention.
    text, vision, hyper = {
        "tiny": ((64, 96, 4, 4, 2, 128), (32, 48, 2, 2, 16, 4), (2, 4)),
        "small": ((768, 2048, 8, 12, 4, 8192), (384, 1536, 6, 6, 112, 14), (4, 8)),
        # Qwen2 7B, so400m
        "full": (
            (3584, 18944, 28, 28, 4, 152064), (1152, 4304, 27, 16, 378, 14), (1, 9, 17, 25)
        ),
    }[size]  # fmt: skip
    config = Owl3Config(
        Qwen2Config(
            hidden_size=text[0], intermediate_size=text[1], num_hidden_layers=text[2],
            num_attention_heads=text[3], num_key_value_heads=text[4], vocab_size=text[5],
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        SiglipVisionConfig(
            hidden_size=vision[0], intermediate_size=vision[1], num_hidden_layers=vision[2],
            num_attention_heads=vision[3], image_size=vision[4], patch_size=vision[5],
        ),
        hyper_layers=hyper, image_token_id=text[5] - 1,
    )  # fmt: skip
    return Owl3(config)


def batch(model: Any, frames: int, text_tokens: int) -> dict[str, Tensor]:
    """Return a batch of one video; each frame has a token of its own in the text."""
    config = model.config
    text, side = config.text_config, config.vision_config.image_size
    # In the first half of the text.
    check_length(text_tokens, text.max_position_embeddings, least=max(3, 2 * frames))
    table = frames_before(frames, text_tokens)
    ids, images = tokens(table, text.vocab_size - 1, config.image_token_id)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, frames, 3, side, side),
        "labels": labels_of(ids, images),
    }
