"""Whisper: frames of a spectrogram, two of which become a key, and the text that is spoken."""

from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.cli.tensors import InputError
from lvxattn.torch_impl.commands.model.text import SPECIAL, check_length


def build(size: str, frames: int, text_tokens: int) -> nn.Module:
    """Return a model of random weights, with room for these frames and this text."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    _check_even(frames)
    wide, layers, heads, vocabulary, mel = {
        "tiny": (32, 2, 2, 128, 8),
        "small": (512, 6, 8, 8192, 80),
        "full": (1280, 32, 20, 51866, 128),  # large-v3
    }[size]
    special: dict[str, Any] = {} if size == "full" else {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
    }  # fmt: skip
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=vocabulary, num_mel_bins=mel, d_model=wide,
            encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * wide,
            decoder_layers=layers, decoder_attention_heads=heads, decoder_ffn_dim=4 * wide,
            max_source_positions=frames // 2, max_target_positions=max(448, text_tokens),
            suppress_tokens=[], begin_suppress_tokens=[], **special,
        )
    )  # fmt: skip
    model.generation_config.suppress_tokens = None
    model.generation_config.begin_suppress_tokens = None
    return model


def batch(model: Any, frames: int, text_tokens: int) -> dict[str, Tensor]:
    """Return a batch of one recording."""
    config = model.config
    _check_even(frames)
    most = 2 * config.max_source_positions
    if frames != most:
        raise InputError(f"--frames: expected {most:,}, as this model requires, got {frames:,}")
    check_length(text_tokens, config.max_target_positions, least=1)
    return {
        "input_features": torch.randn(1, config.num_mel_bins, frames),
        "labels": torch.randint(SPECIAL, config.vocab_size, (1, text_tokens)),
    }


def _check_even(frames: int) -> None:
    if frames % 2:
        raise InputError(f"--frames: expected an even number, got {frames}")
