"""Models of the zoo spread over the ranks of a process group, and alone; rank 0 prints JSON.

By model, dtype, text (with ``/`` and a schedule), and whether keys and values are recomputed:
``logits``, ``loss`` and ``gradients``, the largest difference, relative to the largest element;
``compared``, how many parameters; ``zero``, those without a gradient; ``bits``, whether all ranks
have the same logits, bit for bit; ``bytes``, sent by attention in a step, and planned;
``generated``, by way: whether the tokens are the same, how many layouts were agreed on, and how
many keys of cross-attention are cached by all ranks, and by one process.
"""

import copy
import itertools
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from lvxattn.common.meter import Meter
from lvxattn.plan.steps import messages
from lvxattn.torch_impl import Layout
from tests.programs.start import finish, start

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, as they are imported
    import transformers
    from transformers import AttentionMaskInterface

    from lvxattn.torch_impl.models import distribute, gradients, interception, owl3_adapter, spread
    from lvxattn.torch_impl.models.images import Images
    from lvxattn.torch_impl.models.mllama import Mllama
    from lvxattn.torch_impl.models.text import Text
    from tests import zoo
    from tests.zoo import make_model

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True},
    "static": {"cache_implementation": "static"},
}
# Those whose cache may be static, since transformers 5.
STATIC = "mllama", "owl3_gated", "owl3_fused"


# The layouts that were agreed on, and those that attention was called with.
agreed: list[Any] = []
used: list[Any] = []


def watch() -> None:
    """Have layouts noted."""
    agree, attend = Layout.agree, spread.attend

    def agree_noted(*args: Any, **kwargs: Any) -> Any:
        layout = agree(*args, **kwargs)
        if layout.size > 1:  # not of a process that attends to its own text
            agreed.append(layout)
        return layout

    def attend_noted(*args: Any, **kwargs: Any) -> Any:
        used.append(args[4])
        return attend(*args, **kwargs)

    spread.Layout.agree, spread.attend = staticmethod(agree_noted), attend_noted


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


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest element."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def generated(model: Any, batch: dict[str, Any], way: str) -> Any:
    """Return what generate returns: tokens, and the cache."""
    torch.manual_seed(5)
    return model.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, **WAYS[way])


def cached(outputs: Any) -> int:
    """Return how many keys a layer of cross-attention has in the cache; 0 where it keeps none."""
    cache = outputs.cache if hasattr(outputs, "cache") else outputs.past_key_values
    if hasattr(cache, "visual"):
        return int(cache.visual[1][0][0].shape[2])
    if hasattr(cache, "cross_attention_cache"):
        return int(cache.cross_attention_cache.layers[0].keys.shape[2])
    # Mllama's second layer; in Idefics and OpenFlamingo all layers have the keys of the text.
    return int(cache.layers[1].keys.shape[2]) if len(cache.layers) == 4 else 0


def compare_generated(comm: Any, name: str, alone: Any, model: Any, batch: Any, prompt: Any) -> Any:
    """Return, by way, how generating compares."""
    found: dict[str, Any] = {}
    for way in WAYS:
        if way == "static" and (name not in STATIC or zoo.BEFORE_5):
            continue
        agreed.clear()
        mine, wanted = generated(model, batch, way), generated(alone, prompt, way)
        found[way] = {
            "same": torch.equal(mine.sequences, wanted.sequences),
            "agreed": len(agreed),
            "cached": [sum(comm.allgather(cached(mine))), cached(wanted)],
        }
    return found


def compare(comm: Any, name: str, dtype: str, texts: str, recompute: bool) -> dict[str, Any]:
    """Return how a model spread over ranks differs from itself alone."""
    text, schedule = (*texts.split("/"), "lv-xattn")[:2]
    alone, batch, prompt = make_model(name, getattr(torch, dtype))
    model = copy.deepcopy(alone)
    wanted = alone(**batch)
    loss_of(wanted).backward()

    shares = distribute(model, comm, text=text, schedule=schedule, recompute_kv=recompute)
    shares.meter = Meter()
    used.clear()
    got = model(**shares.inputs(**batch))
    loss_of(got).backward()
    planned = sum(
        send.nbytes
        for layout in used
        for backward in (False, True)
        for send in messages(layout, comm.rank, backward=backward)
    )
    sent = shares.meter.bytes
    shares.average_gradients()

    pairs = zip(model.named_parameters(), alone.parameters(), strict=True)
    grads = {
        key: (p.grad, other.grad)
        for (key, p), other in pairs
        # A softmax does not see what is added to all keys: these are rounding alone.
        if other.grad is not None and not key.endswith(("k_proj.bias", "key.bias"))
    }
    gradients = {key: relative_error(*pair) for key, pair in grads.items() if pair[1].any()}
    tokens = {}
    if prompt and not recompute and text == "replicated":
        tokens = compare_generated(comm, name, alone, model, shares.inputs(**prompt), prompt)
    loss = sum(comm.allgather(loss_of(got).detach())) / comm.size
    results = comm.allgather(result_of(got).detach())
    result, expected = results[0], result_of(wanted)
    if text == "sharded":  # what rows of padding attend to, versions of transformers differ in
        real = batch["attention_mask"].bool()
        result, expected = torch.cat(results, 1)[real], expected[real]
    return {
        "logits": relative_error(result, expected),
        "loss": relative_error(loss, loss_of(wanted)),
        "gradients": max(gradients.values()),
        "worst": max(gradients, key=lambda key: gradients[key]),
        "compared": len(gradients),
        "zero": sorted(grads.keys() - gradients.keys()),
        "generated": tokens,
        "bits": text == "sharded" or all(torch.equal(result, other) for other in results),
        "bytes": [sent, planned],
    }


def plant(fault: str) -> None:
    """Break what the models need, as it is easily got wrong."""
    if fault == "no factor P":  # the gradients of keys and values are averaged like the text's
        gradients.ScaledGradient.backward = staticmethod(lambda _, dx: (dx, None))
    elif fault == "no mask function":  # self-attention loses its padding
        AttentionMaskInterface.register(interception.ATTENTION, lambda *_, **__: None)
    elif fault == "positions from the first":  # visual keys' on every rank
        cut = owl3_adapter.SpreadOwl3.cut

        def from_the_first(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
            local = cut(self, batch)
            encoded = local["pixel_values"].shape[1]
            self.model.given = lambda _: slice(0, encoded)
            return local

        owl3_adapter.SpreadOwl3.cut = from_the_first  # type: ignore[method-assign]
    elif fault == "local mask":  # a row that sees none of a rank's images sees all of them
        whole = Mllama._take_mask

        def take_mask(self: Any, module: Any, args: Any, kwargs: Any) -> Any:
            seen = kwargs["cross_attention_mask"].flatten(2).bool()
            result = whole(self, module, args, kwargs)
            tiles = seen.shape[2] // self.images
            mine = slice(self.mine.start * tiles, self.mine.stop * tiles)
            dead = ~seen[:, :, mine].any(-1, keepdim=True)
            self.table[:, :, mine] = seen[:, :, mine] | dead
            return result

        Mllama._take_mask = take_mask
    elif fault == "tile order":  # the mask of an image's tiles is that of its others
        right_way = Mllama._take_mask

        def take_reversed(self: Any, module: Any, args: Any, kwargs: Any) -> Any:
            kwargs["cross_attention_mask"] = kwargs["cross_attention_mask"].flip(3)
            return right_way(self, module, args, kwargs)

        Mllama._take_mask = take_reversed
    elif fault == "gates at 0":  # as a new model has them: its keys and values get no gradients
        zoo.GATE = 0.0
    elif fault == "local positions":  # rotary embeddings begin at 0 on every rank
        right = Text.cut
        Text.cut = lambda *args: right(*args) | {"position_ids": None}
    elif fault == "no image":  # a rank without images encodes none
        Images.encoded = property(lambda self: slice(self.mine.start, self.mine.stop))
    else:
        raise ValueError(fault)


def main() -> None:
    """Compare the models that the arguments name, with the faults that the others name."""
    comm, _ = start()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of OpenFlamingo, which is older
    names, dtypes, texts = (argument.split(",") for argument in sys.argv[1:4])
    watch()
    for fault in sys.argv[4:]:
        plant(fault)
    report = {}
    for given in itertools.product(names, dtypes, texts, (False, True)):
        report[" ".join(map(str, given))] = comm.allgather(compare(comm, *given))
    if comm.rank == 0:
        print(json.dumps(report))
    finish(comm)


if __name__ == "__main__":
    main()
