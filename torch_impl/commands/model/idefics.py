"""Idefics, an open Flamingo of transformers: a token sees the frames before it."""

from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.commands.model.text import check_length, frames_before, labels_of, tokens


def build(size: str, frames: int, text_tokens: int) -> nn.Module:  # noqa: ARG001 - of any length
    """Return a model of random weights."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes: dict[str, dict[str, Any]] = {
        "tiny": {
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "cross_layer_interval": 2, **special,
            "vision_config": {
                "embed_dim": 32, "image_size": 16, "patch_size": 4, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 48,
            },
            "perceiver_config": {
                "resampler_n_latents": 8, "resampler_depth": 1, "resampler_n_heads": 2,
                "resampler_head_dim": 16,
            },
        },
        "small": {
            "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
            "num_hidden_layers": 8, "num_attention_heads": 8, "cross_layer_interval": 4, **special,
            "vision_config": {
                "embed_dim": 384, "image_size": 112, "patch_size": 14, "num_hidden_layers": 6,
                "num_attention_heads": 6, "intermediate_size": 1536,
            },
            "perceiver_config": {
                "resampler_n_latents": 64, "resampler_depth": 2, "resampler_n_heads": 8,
                "resampler_head_dim": 64,
            },
        },
        # Sizes of the 9B model.  Its loss does not support additional tokens.
        "full": {
            "cross_layer_interval": 4,
            "vision_config": {
                "embed_dim": 1280, "image_size": 224, "patch_size": 14, "num_hidden_layers": 32,
                "num_attention_heads": 16, "intermediate_size": 5120,
            },
            "perceiver_config": {
                "resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16,
                "resampler_head_dim": 96,
            },
        },
    }  # fmt: skip
    config = IdeficsConfig(
        additional_vocab_size=0, use_resampler=True, alpha_type="float",
        alphas_initializer_range=0.0, freeze_text_layers=False, freeze_vision_layers=False,
        **sizes[size],
    )  # fmt: skip
    return IdeficsForVisionText2Text(config)


def batch(model: Any, frames: int, text_tokens: int) -> dict[str, Tensor]:
    """Return a batch of one video."""
    config = model.config
    check_length(text_tokens, config.max_position_embeddings)
    table = frames_before(frames, text_tokens)
    ids, images = tokens(table, config.vocab_size, config.vocab_size - 1)
    side = config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, frames, 3, side, side),
        "image_attention_mask": table[None].long(),
        "labels": labels_of(ids, images),
    }
