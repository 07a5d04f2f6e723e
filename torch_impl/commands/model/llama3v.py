"""Llama 3.2 Vision: an image a frame, in tiles; a token sees the frames before it."""

from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.commands.model.text import check_length, frames_before, labels_of, tokens


def build(size: str, frames: int, text_tokens: int) -> nn.Module:  # noqa: ARG001 - of any length
    """Return a model of random weights."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import (
        MllamaTextConfig,
        MllamaVisionConfig,
    )

    texts: dict[str, dict[str, Any]] = {
        "tiny": {
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        "small": {
            "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048,
            "num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4,
            "cross_attention_layers": [3, 8], "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "full": {},  # the configuration's defaults are those of 11B
    }  # fmt: skip
    # The features of the last layer, and of one before it, side by side.
    visions: dict[str, dict[str, Any]] = {
        "tiny": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "image_size": 16, "patch_size": 4,
            "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "small": {
            "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
            "num_global_layers": 2, "attention_heads": 4, "vision_output_dim": 512,
            "intermediate_layers_indices": [1], "image_size": 112, "patch_size": 14,
            "max_num_tiles": 4,
        },
        "full": {"image_size": 560},
    }  # fmt: skip
    config = MllamaConfig(
        vision_config=MllamaVisionConfig(**visions[size]),
        text_config=MllamaTextConfig(**texts[size]),
        image_token_index=texts[size].get("vocab_size", 128256),
    )
    return MllamaForConditionalGeneration(config)


def batch(model: Any, frames: int, text_tokens: int) -> dict[str, Tensor]:
    """Return a batch of one video; every frame fills all tiles of an image."""
    text, vision = model.config.text_config, model.config.vision_config
    check_length(text_tokens, text.max_position_embeddings)
    tiles = vision.max_num_tiles
    # Ratios count from 1, since 0 is padding.
    ratio = 1 + [a * b for a, b in vision.supported_aspect_ratios].index(tiles)
    table = frames_before(frames, text_tokens)  # (S, frames)
    ids, images = tokens(table, text.vocab_size, model.config.image_token_index)
    side = vision.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, frames, tiles, vision.num_channels, side, side),
        "aspect_ratio_ids": torch.full((1, frames), ratio),
        "aspect_ratio_mask": torch.ones(1, frames, tiles, dtype=torch.long),
        "cross_attention_mask": table[None, :, :, None].long().repeat(1, 1, 1, tiles),
        "labels": labels_of(ids, images),
    }
