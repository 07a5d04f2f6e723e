"""Multimodal models of random weights, small enough to compute on ranks in moments, and batches.

Gates that start at 0 are opened: behind a closed one nothing is tested.
"""

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VOCABULARY = 64
B, S, IMAGES, TILES = 2, 9, 5, 2
GATE = 0.5
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5

# A model, its keyword arguments for a forward with a loss, and those of generate, if it has one.
ModelCase = tuple[nn.Module, dict[str, Any], dict[str, Any] | None]


def mllama() -> ModelCase:
    """Llama 3.2 Vision, with tiles, padding, and tokens that see no image."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import (
        MllamaTextConfig,
        MllamaVisionConfig,
    )
    from transformers.models.mllama.modeling_mllama import MllamaTextRMSNorm

    text = MllamaTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, cross_attention_layers=[1, 3],
        **rotary(), **TOKENS,
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_global_layers=1, attention_heads=2,
        intermediate_size=24, vision_output_dim=32, image_size=8, patch_size=4,
        max_num_tiles=TILES, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    in_its_own_dtype(MllamaTextRMSNorm)
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    model.loss_function = causal_loss
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.is_causal = False  # else SDPA takes a missing mask for a causal one
    given = {
        **text_of(),
        "pixel_values": torch.randn(B, IMAGES, TILES, 3, 8, 8),
        "aspect_ratio_ids": torch.full((B, IMAGES), 2),
        "aspect_ratio_mask": torch.ones(B, IMAGES, TILES, dtype=torch.long),
        "cross_attention_mask": images_before()[..., None].repeat(1, 1, 1, TILES),
    }
    # The second image has one tile: the other is padding.
    given["aspect_ratio_ids"][:, 1] = 1
    given["aspect_ratio_mask"][:, 1, 1] = given["cross_attention_mask"][:, :, 1, 1] = 0
    return model, {**given, "labels": labels_of(given)}, given


def idefics(resampler: bool = True) -> ModelCase:
    """An open Flamingo of transformers."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text
    from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm

    in_its_own_dtype(IdeficsRMSNorm)
    config = IdeficsConfig(
        vocab_size=VOCABULARY, additional_vocab_size=0, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, cross_layer_interval=1,
        use_resampler=resampler, alphas_initializer_range=0.0, alpha_type="float",
        vision_config={
            "embed_dim": 16, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 24,
        },
        perceiver_config={
            "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8,
        },
        **TOKENS,
    )  # fmt: skip
    given = {
        **text_of(),
        "pixel_values": torch.randn(B, IMAGES, 3, 8, 8),
        "image_attention_mask": images_before(),
    }
    model = IdeficsForVisionText2Text(config)
    model.loss_function = causal_loss
    return model, {**given, "labels": labels_of(given)}, given


def idefics_without_resampler() -> ModelCase:
    """The same, whose text sees all patches of an image."""
    return idefics(resampler=False)


def whisper() -> ModelCase:
    """Speech to text: 20 frames of the encoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration(
        WhisperConfig(
            **encoder_and_decoder(), num_mel_bins=8, max_source_positions=20,
            max_target_positions=32, suppress_tokens=[], begin_suppress_tokens=[],
        )
    )  # fmt: skip
    model.generation_config.suppress_tokens = None
    model.generation_config.begin_suppress_tokens = None
    given = {"input_features": torch.randn(B, 8, 40)}
    return model, {**given, "labels": torch.randint(3, VOCABULARY, (B, S))}, given


def bart() -> ModelCase:
    """Text to text, padded."""
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(
        BartConfig(**encoder_and_decoder(), max_position_embeddings=64, forced_eos_token_id=None)
    )
    given = text_of()
    given["attention_mask"] = given["attention_mask"].flip(1)  # padded at the end
    return model, {**given, "labels": torch.randint(3, VOCABULARY, (B, S))}, given


def t5gemma() -> ModelCase:
    """Text to text, with grouped heads."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaRMSNorm

    part = T5GemmaModuleConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        attn_logit_softcapping=None, final_logit_softcapping=None, **TOKENS,
    )  # fmt: skip
    model = T5GemmaForConditionalGeneration(
        T5GemmaConfig(
            encoder=part, decoder=part, dropout_rate=0.0, attention_dropout=0.0,
            vocab_size=VOCABULARY,
        )
    )  # fmt: skip
    in_its_own_dtype(T5GemmaRMSNorm)
    given = text_of()
    given["attention_mask"] = given["attention_mask"].flip(1)
    return model, {**given, "labels": torch.randint(3, VOCABULARY, (B, S))}, given


def qformer() -> ModelCase:
    """BLIP-2's Q-Former: a few learned queries, and an image's features."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    model = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            cross_attention_frequency=1, encoder_hidden_size=12,
        )
    )  # fmt: skip
    given = {
        "query_embeds": torch.randn(B, 4, 16),
        "encoder_hidden_states": torch.randn(B, 10, 12),
    }
    return model, given, None


def openflamingo() -> ModelCase:
    """OpenFlamingo's own package over a Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    in_its_own_dtype(LlamaRMSNorm)
    return flamingo(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, **TOKENS,
            )
        ),
        "model.layers",
    )  # fmt: skip


def openflamingo_all() -> ModelCase:
    """The same, whose text sees all images before it, not the last one only."""
    model, batch, given = openflamingo()
    for module in model.modules():
        if type(module).__name__ == "MaskedCrossAttention":
            module.only_attend_immediate_media = False
    return model, batch, given


def openflamingo_opt() -> ModelCase:
    """The same over an OPT."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, **TOKENS,
    )  # fmt: skip
    return flamingo(OPTForCausalLM(config), "model.decoder.layers")


def openflamingo_neox() -> ModelCase:
    """The same over a GPT-NeoX."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, **TOKENS,
    )  # fmt: skip
    return flamingo(GPTNeoXForCausalLM(config), "gpt_neox.layers")


def flamingo(text: Any, layers: str) -> ModelCase:
    """Return an OpenFlamingo over a language model; a token stands for each image."""
    sys.modules.setdefault("open_clip", types.ModuleType("open_clip"))  # which it imports for CLIP
    from open_flamingo.src.flamingo import Flamingo
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.utils import extend_instance

    text.loss_function = causal_loss
    extend_instance(text, FlamingoLMMixin)
    text.set_decoder_layers_attr_name(layers)
    image = VOCABULARY - 1
    model = Flamingo(types.SimpleNamespace(visual=Patches()), text, 2, image, 16)
    ids = torch.randint(3, image, (B, S))
    ids[:, 1] = ids[:, 4] = ids[0, 6] = ids[0, 7] = image  # the last one of an image too many
    given = {
        "vision_x": torch.randn(B, 3, 1, 3, 4, 4),
        "lang_x": ids,
        "attention_mask": text_of()["attention_mask"],
    }
    return model, {**given, "labels": ids}, given


def owl3_gated(fused: bool = False) -> ModelCase:
    """mPLUG-Owl3, with padding, text before the first image, and rows with fewer images."""
    from transformers import Qwen2Config, SiglipVisionConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    from lvxattn.torch_impl.models.owl3 import Owl3, Owl3Config

    in_its_own_dtype(Qwen2RMSNorm)
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **TOKENS,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    image = VOCABULARY - 1
    model = Owl3(Owl3Config(text, vision, hyper_layers=(1, 3), fused=fused, image_token_id=image))
    model.language_model.loss_function = causal_loss
    given = text_of()
    ids = given["input_ids"].clamp(max=image - 1)
    ids[:, [2, 3, 5]] = ids[1, 7] = image
    given |= {"input_ids": ids, "pixel_values": torch.randn(B, IMAGES, 3, 8, 8)}
    return model, {**given, "labels": labels_of(given)}, given


def owl3_fused() -> ModelCase:
    """The same, of one softmax over text and images."""
    return owl3_gated(fused=True)


class Patches(nn.Module):
    """A vision tower in the form of open_clip: (N, 3, 4, 4) to a pooled vector and 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patches' mean, and the patches."""
        patches = self.projection(x.reshape(len(x), 4, 12))  # (N, 4, 16)
        return patches.mean(1), patches


MODELS: dict[str, Callable[[], ModelCase]] = {
    f.__name__: f
    for f in (
        mllama, idefics, idefics_without_resampler, whisper, bart, t5gemma, qformer, openflamingo,
        openflamingo_all, openflamingo_opt, openflamingo_neox,
        owl3_gated, owl3_fused,
    )
}  # fmt: skip
# The Q-Former of transformers 4 computes attention itself.
MISSING = {"openflamingo": not find_spec("open_flamingo"), "qformer": BEFORE_5}
HERE = [name for name in MODELS if not MISSING.get(name.partition("_")[0])]


def make_model(name: str, dtype: torch.dtype) -> ModelCase:
    """Return a model of the zoo, its gates open, and its batches."""
    torch.manual_seed(0)
    model, *batches = MODELS[name]()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ("gate" in key or "alpha" in key) and not p.any():
                p.fill_(GATE)

    def cast(batch: dict[str, Any] | None) -> Any:
        return batch and {
            key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()
        }

    return model.to(dtype).eval(), *map(cast, batches)


def text_of() -> dict[str, Any]:
    """Return tokens, and a mask: the second row begins with two of padding."""
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (B, S)), "attention_mask": mask}


def labels_of(given: dict[str, Any]) -> Tensor:
    """Return the tokens as labels, but for padding and the first real one."""
    labels = given["input_ids"].clone()
    labels[1, :3] = -100
    return labels


def images_before() -> Tensor:
    """Return which token sees which image: the first three none, then one more each."""
    seen = torch.arange(IMAGES) < torch.arange(S)[:, None] - 3
    seen = seen.long().repeat(B, 1, 1)  # (B, S, IMAGES)
    seen[1, :, 2] = 0
    return seen


def encoder_and_decoder() -> dict[str, Any]:
    """Return what BART and Whisper are configured with."""
    return {
        "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "decoder_start_token_id": 3, "dropout": 0.0, **TOKENS,
    }  # fmt: skip


def rotary() -> dict[str, Any]:
    """Return a configuration's arguments for rotary embeddings, which transformers 5 renamed."""
    if BEFORE_5:
        return {"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e4}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def causal_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return the loss as the models do, but in the dtype of the logits: theirs is float32."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    count = (shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    rows, targets = logits.reshape(-1, vocab_size), shift_labels.reshape(-1)
    return nn.functional.cross_entropy(rows, targets, reduction="sum") / count


def in_its_own_dtype(norm: Any) -> None:
    """Have a norm compute in its input's dtype.

    The models' compute in float32, which would hide errors of float64 behind its own.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", getattr(self, "eps", None))
        weight = 1 + self.weight if "T5Gemma" in type(self).__name__ else self.weight
        normal: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        return normal

    norm.forward = forward
