"""Models of the zoo spread over the ranks of a process group, and alone; rank 0 prints JSON.

By model and dtype: ``logits`` and ``gradients``, the largest difference, relative to the largest
element; ``compared``, how many parameters; ``generated``, by way, whether all ranks have the tokens
that one process has; ``bits``, whether all ranks have the same logits, bit for bit.
"""

import copy
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from tests.programs.start import finish, start

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, as they are imported
    import transformers
    from transformers import AttentionMaskInterface

    from lvxattn.torch_impl.models import distribute, interception, owl3_adapter, spread
    from tests.zoo import animal

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True},
}


def loss_of(outputs: Any) -> Tensor:
    """Return the model's loss, or one of its features."""
    loss: Tensor | None = getattr(outputs, "loss", None)
    if loss is not None:
        return loss
    features = outputs.last_hidden_state
    return (features * torch.arange(1, 1 + features.shape[-1])).square().mean()


def result_of(outputs: Any) -> Tensor:
    """Return logits, or features."""
    result: Tensor = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if result is None else result


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest element."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def generated(model: Any, batch: dict[str, Any], way: str) -> Tensor:
    """Return tokens."""
    torch.manual_seed(5)
    tokens: Tensor = model.generate(**batch, max_new_tokens=6, **WAYS[way])
    return tokens


def compare(comm: Any, name: str, dtype: str, recompute: bool) -> dict[str, Any]:
    """Return how a model spread over ranks differs from itself alone."""
    alone, batch, prompt = animal(name, getattr(torch, dtype))
    model = copy.deepcopy(alone)
    wanted = alone(**batch)
    loss_of(wanted).backward()

    shares = distribute(model, comm, recompute_kv=recompute)
    got = model(**shares.inputs(**batch))
    loss_of(got).backward()
    shares.average_gradients()

    pairs = zip(model.named_parameters(), alone.parameters(), strict=True)
    gradients = {
        key: apart(p.grad, other.grad)
        for (key, p), other in pairs
        # A softmax does not see what is added to all keys: these are rounding alone.
        if other.grad is not None and not key.endswith(("k_proj.bias", "key.bias"))
    }
    ways = WAYS if prompt and not recompute else ()
    tokens = {
        way: torch.equal(
            generated(model, shares.inputs(**prompt), way), generated(alone, prompt, way)
        )
        for way in ways
    }
    result = result_of(got).detach()
    return {
        "logits": apart(result, result_of(wanted)),
        "gradients": max(gradients.values()),
        "worst": max(gradients, key=lambda key: gradients[key]),
        "compared": len(gradients),
        "generated": tokens,
        "bits": all(torch.equal(result, other) for other in comm.allgather(result)),
    }


def plant(fault: str) -> None:
    """Break what the models need, as it is easily got wrong."""
    if fault == "no factor P":  # the gradients of keys and values are averaged like the text's
        spread.ScaledGradient.backward = staticmethod(lambda _, dx: (dx, None))
    elif fault == "no mask function":  # self-attention loses its padding
        AttentionMaskInterface.register(interception.ATTENTION, lambda *_, **__: None)
    elif fault == "positions from the first":  # visual keys' on every rank
        cut = owl3_adapter.SpreadOwl3.cut

        def from_the_first(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
            local = cut(self, batch)
            self.model.given = slice(0, local["pixel_values"].shape[1])
            return local

        owl3_adapter.SpreadOwl3.cut = from_the_first  # type: ignore[method-assign]
    else:
        raise ValueError(fault)


def main() -> None:
    """Compare the models that the arguments name, with the faults that the others name."""
    comm, _ = start()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of OpenFlamingo, which is older
    names, dtypes = (argument.split(",") for argument in sys.argv[1:3])
    for fault in sys.argv[3:]:
        plant(fault)
    report = {}
    for name in names:
        for dtype in dtypes:
            for recompute in (False, True):
                mine = compare(comm, name, dtype, recompute)
                every = comm.allgather(mine)
                report[f"{name} {dtype} {recompute}"] = every
    if comm.rank == 0:
        print(json.dumps(report))
    finish(comm)


if __name__ == "__main__":
    main()
