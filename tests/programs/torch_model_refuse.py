"""What a spread model is given that it must refuse; rank 0 prints all ranks' messages as JSON."""

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.programs.start import finish, start

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, as they are imported
    import transformers

    from lvxattn.torch_impl.models import Spread, distribute
    from tests.zoo import make_model

IMAGES = "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"


def other_text(model: Any, spread: Spread, batch: dict[str, Any]) -> None:
    """Give rank 1 another text."""
    spread.inputs(**batch | {"input_ids": batch["input_ids"] + spread.group.rank})


def other_option(model: Any, spread: Spread, batch: dict[str, Any]) -> None:
    """Give rank 1 another number."""
    spread.inputs(**batch, logits_to_keep=spread.group.rank)


def no_images(model: Any, spread: Spread, batch: dict[str, Any]) -> None:
    """Give rank 1 no images."""
    spread.inputs(**batch | {"pixel_values": None} if spread.group.rank else batch)


def unlike_images(model: Any, spread: Spread, batch: dict[str, Any]) -> None:
    """Give more images than aspect ratios."""
    spread.inputs(**batch | {"pixel_values": batch["pixel_values"].repeat(1, 2, 1, 1, 1, 1)})


def not_cut(model: Any, spread: Spread, batch: dict[str, Any]) -> None:
    """Give the model all images on rank 1."""
    local = spread.inputs(**batch)
    model(**local | {name: batch[name] for name in IMAGES} if spread.group.rank else local)


def nothing_cut(model: Any, spread: Spread, batch: dict[str, Any]) -> None:
    """Give the model a batch that was never cut."""
    model(**batch)


def dropout(model: Any, spread: Spread, batch: dict[str, Any]) -> None:
    """Train with dropout in cross-attention on rank 1."""
    if spread.group.rank:
        for layer in model.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                layer.cross_attn.dropout = 0.1
    model.train()(**spread.inputs(**batch))


REFUSED: dict[str, Callable[[Any, Spread, dict[str, Any]], None]] = {
    f.__name__: f
    for f in (other_text, other_option, no_images, unlike_images, not_cut, nothing_cut, dropout)
}


def main() -> None:
    """Try all of them."""
    comm, _ = start(timeout=20.0)
    transformers.logging.set_verbosity_error()
    report = {}
    for text in sys.argv[1].split(","):
        for name, refused in REFUSED.items():
            model, batch, _ = make_model("mllama", torch.float32)
            message = "nothing was raised"
            try:
                refused(model, distribute(model, comm, text=text), batch)
            except (ValueError, RuntimeError) as error:
                message = f"{type(error).__name__}: {error}"
            report[f"{name} {text}"] = comm.allgather(message)
    if comm.rank == 0:
        print(json.dumps(report))
    finish(comm)


if __name__ == "__main__":
    main()
