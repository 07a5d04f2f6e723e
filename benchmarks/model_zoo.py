"""The paper's models, scaled down, with batches whose visual features are given."""

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 512
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Batch = dict[str, Any]


def llama3v(
    text_tokens: int, features: int, *, hidden: int = 256, layers: int = 10, cross: int = 2,
    heads: int = 8, kv_heads: int = 2,
) -> tuple[nn.Module, Batch]:  # fmt: skip
    """Return Llama 3.2 Vision: by default a fifth of its layers cross, as in the original."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import (
        MllamaTextConfig,
        MllamaVisionConfig,
    )

    every = layers // cross
    text = MllamaTextConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=3 * hidden,
        cross_attention_layers=[every * (n + 1) - 1 for n in range(cross)],
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **TOKENS,
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_global_layers=1, attention_heads=2,
        intermediate_size=16, vision_output_dim=32, image_size=8, patch_size=4, max_num_tiles=1,
        intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    given = torch.randn(1, features, hidden)
    return open_gates(model), {**random_text(text_tokens), "cross_attention_states": given}


def owl3(
    text_tokens: int, features: int, *, hidden: int = 256, layers: int = 14, cross: int = 2
) -> tuple[nn.Module, Batch]:
    """Return mPLUG-Owl3, version 241101: a seventh of its layers cross; 729 features a frame."""
    from transformers import Qwen2Config, SiglipVisionConfig

    from lvxattn.torch_impl.models.owl3 import Owl3, Owl3Config

    every = layers // cross
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=3 * hidden, **TOKENS,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    hyper = [every * n + 1 for n in range(cross)]
    model = Owl3(Owl3Config(text, vision, hyper_layers=hyper, image_token_id=VOCABULARY - 1))
    model.encode = lambda x: x  # type: ignore[method-assign]
    images = features // 729
    batch = random_text(text_tokens) | {"pixel_values": torch.randn(1, images, 729, hidden)}
    # All frames of a video stand in the place of the first token.
    return model.train(), batch | {"image_positions": torch.zeros(1, images, dtype=torch.long)}


def openflamingo(
    text_tokens: int, features: int, *, hidden: int = 256, layers: int = 8, cross: int = 2
) -> tuple[nn.Module, Batch]:
    """Return OpenFlamingo: a fourth of its layers cross, as in its 9b; 64 features of an image."""
    sys.modules.setdefault("open_clip", types.ModuleType("open_clip"))  # which it imports for CLIP
    from open_flamingo.src.flamingo import Flamingo
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.utils import extend_instance
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=8, intermediate_size=3 * hidden, **TOKENS,
        )
    )  # fmt: skip
    extend_instance(text, FlamingoLMMixin)
    text.set_decoder_layers_attr_name("model.layers")
    image, width = VOCABULARY - 1, 64
    tower = types.SimpleNamespace(visual=lambda x: (None, x.flatten(1, 2)))
    model = Flamingo(tower, text, 2, image, width, cross_attn_every_n_layers=layers // cross)
    model.perceiver = GivenFeatures()
    for module in model.modules():  # a question about the whole video sees all of its frames
        if type(module).__name__ == "MaskedCrossAttention":
            module.only_attend_immediate_media = False
    batch = random_text(text_tokens)
    frames = features // 64
    # Frames at the start of the text, as many as there are, in one token: those of a video.
    given = torch.randn(1, frames, 1, 1, 64, width)
    mask = torch.ones(1, text_tokens, dtype=torch.long)
    return open_gates(model), {
        "vision_x": given, "lang_x": batch["input_ids"], "attention_mask": mask,
        "labels": batch["labels"],
    }  # fmt: skip


class GivenFeatures(nn.Module):
    """In place of the resampler: features that are given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, images, 64, width) of (B, images, 1, 64, width)."""
        return x.squeeze(2)


def random_text(text_tokens: int) -> Batch:
    """Return a text to be learnt."""
    ids = torch.randint(3, VOCABULARY, (1, text_tokens))
    return {"input_ids": ids, "labels": ids}


def open_gates(model: nn.Module) -> nn.Module:
    """Return a model whose gates are open: behind closed ones nothing would be computed back."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name and p.numel() == 1:
                p.fill_(0.5)
    return model.train()


MODELS: dict[str, Callable[..., tuple[nn.Module, Batch]]] = {
    f.__name__: f for f in (llama3v, owl3, openflamingo)
}
