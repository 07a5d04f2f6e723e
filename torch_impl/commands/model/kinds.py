"""The models of the command: how each is built, loaded and fed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.cli.tensors import InputError
from lvxattn.torch_impl.commands.model import idefics, llama3v, openflamingo, owl3, whisper

SIZES = "tiny", "small", "full"
# What a gate is called that begins at 0: behind a closed one nothing is tested.
GATES = "gate", "alpha"


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes
    ----------
    build : callable
        ``build(size, frames, text_tokens)`` returns one of random weights.
    batch : callable
        ``batch(model, frames, text_tokens)`` returns its arguments for a forward with a loss, or
        raises InputError where the model has no room for them.
    package : str
        The distribution to install for it.
    checkpoint : str, optional
        The class of transformers that loads its checkpoints.
    model_type : str, optional
        What their configuration calls it.
    tower, cross : tuple of str
        Ends of the names, or names of the classes, of the modules that encode the visual input, and
        of the layers that attend to it.
    """

    build: Callable[[str, int, int], nn.Module]
    batch: Callable[[Any, int, int], dict[str, Tensor]]
    tower: tuple[str, ...]
    cross: tuple[str, ...]
    checkpoint: str = ""
    model_type: str = ""
    package: str = "transformers"


KINDS = {
    "llama3v": Kind(
        llama3v.build, llama3v.batch, (".vision_model", ".multi_modal_projector"),
        (".cross_attn",), "MllamaForConditionalGeneration", "mllama",
    ),
    "owl3": Kind(
        owl3.build, owl3.batch, ("vision_model", "vision2text_model"), ("HyperAttention",)
    ),
    "openflamingo": Kind(
        openflamingo.build, openflamingo.batch, ("vision_encoder", "perceiver"),
        (".gated_cross_attn_layer.attn",), package="open_flamingo",
    ),
    "idefics": Kind(
        idefics.build, idefics.batch, (".vision_model", ".perceiver_resampler"), (".cross_attn",),
        "IdeficsForVisionText2Text", "idefics",
    ),
    "whisper": Kind(
        whisper.build, whisper.batch, ("model.encoder",), (".encoder_attn",),
        "WhisperForConditionalGeneration", "whisper",
    ),
}  # fmt: skip


def random_model(kind: Kind, size: str, frames: int, text_tokens: int, seed: int) -> nn.Module:
    """Return a model of random weights, its gates open, in PyTorch's default dtype and device.

    Parameters
    ----------
    kind : Kind
    size : str
        One of `SIZES`.
    frames, text_tokens : int
        What it must have room for, where its configuration limits that.
    seed : int
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.build(size, frames, text_tokens)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(word in name for word in GATES) and not p.is_meta and not p.any():
                p.fill_(0.5)
    return model


def checkpoint_model(kind: Kind, folder: str, dtype: torch.dtype) -> nn.Module:
    """Return the model of a folder that ``save_pretrained`` wrote.

    Only safetensors are read: other files of weights are pickles, which may run code.

    Raises
    ------
    InputError
    """
    import transformers

    if not kind.checkpoint:
        raise InputError(f"--weights: {kind.package} has no checkpoints that transformers loads")
    if not Path(folder).is_dir():
        raise InputError(f"--weights: expected a folder, got {folder}")
    if not Path(folder, "config.json").is_file():
        raise InputError(
            f"--weights: expected a folder that save_pretrained wrote, and {folder} has no "
            "config.json"
        )
    if Path(folder, "adapter_config.json").exists():  # its weights would be read as a pickle, too
        raise InputError(f"--weights: expected a model without adapter, got one in {folder}")
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        found = transformers.AutoConfig.from_pretrained(folder, **given).model_type
        if found == kind.model_type:
            loader = getattr(transformers, kind.checkpoint)
            model: nn.Module = loader.from_pretrained(
                folder, **given, dtype=dtype, use_safetensors=True
            )
            return model
    except Exception as error:  # a damaged file raises whatever its reader raises
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--weights: {folder} cannot be loaded: {reason}") from None
    raise InputError(f"--weights: expected a model of type {kind.model_type}, got {found}")


def least_nbytes(
    kind: Kind, size: str | None, folder: str | None, dtype: torch.dtype, sizes: tuple[int, int]
) -> tuple[int, int]:
    """Return how many bytes the weights and a batch take.

    Parameters
    ----------
    kind : Kind
    size, folder : str, optional
        Of a model of random weights, or where a checkpoint is; one of the two.
    dtype : torch.dtype
    sizes : (frames, text_tokens)

    Returns
    -------
    weights, batch : int
        0 for the batch of a checkpoint, which is not read for it.
    """
    if folder is not None:  # at most four bytes a number
        files = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        return files * min(4, dtype.itemsize) // 4, 0
    with torch.device("meta"):  # no memory is taken
        model = random_model(kind, size or SIZES[0], *sizes, seed=0)
        batch = kind.batch(model, *sizes)
    numbers = sum(p.numel() for p in model.parameters())
    of_batch = sum(x.numel() * x.element_size() for x in batch.values())
    return numbers * dtype.itemsize, of_batch


def parts(model: nn.Module, ends: tuple[str, ...]) -> list[nn.Module]:
    """Return the modules whose names end so, or whose classes are called so."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(ends) or type(module).__name__ in ends
    ]
