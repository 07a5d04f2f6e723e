"""The model of notebook 9, and what its cells compare."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lvxattn.torch_impl.commands.model.kinds import KINDS, random_model
from lvxattn.torch_impl.models import distribute

LLAMA = KINDS["llama3v"]


def tiny_llama(frames: int = 16, text_tokens: int = 24) -> tuple[Any, dict[str, Tensor]]:
    """Return a Llama 3.2 Vision of random weights, its gates open, and a batch of one video.

    Both are the same in every process.
    """
    model = random_model(LLAMA, "tiny", frames, text_tokens, seed=0)
    torch.manual_seed(0)
    return model, LLAMA.batch(model, frames, text_tokens)


def as_float64(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return a model, changed in place, and its batch in float64."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    return model.double(), wide


def error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest element of b."""
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())


def gradient_errors(model: nn.Module, other: nn.Module) -> dict[str, float]:
    """Return the errors of a model's gradients by parameter, where the other's are not 0."""
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return {name: error(p.grad, q.grad) for (name, p), q in pairs if q.grad.any()}


# Changes what `distribute` has made, or this rank's inputs, given the whole batch, too.
Fault = Callable[[Any, dict[str, Any], dict[str, Any]], None]


def compare(
    fault: Fault | None = None, *, gates: float = 0.5, text: str = "replicated"
) -> dict[str, Any]:
    """Return the errors of logits, loss and gradients on the ranks against one process.

    Collective.  Gates of cross-attention have the given value, and a fault is planted.
    """
    model, batch = tiny_llama()
    for name, p in model.named_parameters():
        if name.endswith(("attn_gate", "mlp_gate")):
            p.data.fill_(gates)
    alone = copy.deepcopy(model)
    wanted = alone(**batch)
    wanted.loss.backward()
    spread = distribute(model, text=text)
    local = spread.inputs(**batch)
    if fault is not None:
        fault(spread, batch, local)
    got = model(**local)
    got.loss.backward()
    spread.average_gradients()
    length = batch["input_ids"].shape[1]
    rows = spread.share(length) if text == "sharded" else range(length)
    logits = error(got.logits, wanted.logits[:, rows.start : rows.stop])
    loss = sum(spread.group.allgather(got.loss.item())) / spread.group.size
    return {
        "logits": max(spread.group.allgather(logits)),
        "loss": abs(loss / wanted.loss.item() - 1),
        "gradients": gradient_errors(model, alone),
    }


def generate(model: Any, prompt: dict[str, Any], **options: Any) -> tuple[list[int], list[int]]:
    """Return 8 generated tokens, and how many keys each layer's cache has in this process."""
    torch.manual_seed(0)  # sampling ranks must draw the same
    outputs = model.generate(
        **prompt, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True, **options
    )
    cache = outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
    return outputs["sequences"][0, -8:].tolist(), [x.keys.shape[2] for x in cache.layers]


def quickest_step(work: Any, count: int = 4) -> dict[str, float]:
    """Return the seconds of the parts of a training step: of several, the quickest."""
    costs = [work.step(update=True)[1] for _ in range(count)]
    return dict(vars(min(costs, key=lambda cost: cost.total)))
