"""A spread model in the settings that people train in; rank 0 prints JSON.

By setting, text and whether keys and values are recomputed: the largest difference of a gradient
from one process, relative to the largest element, and how many were compared.  Under autocast, of
all elements together, the difference from float64, and that of one process (``alone``).
"""

import copy
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.programs.start import finish, start

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, as they are imported
    import transformers

    from lvxattn.torch_impl.models import Spread, distribute
    from tests.programs.torch_models import relative_error
    from tests.zoo import make_model

# Ranks along the dimensions data and context of a mesh.
DATA, CONTEXT = 2, 2

# One step of the model alone, or, with a Spread, of its ranks.
Step = Callable[[nn.Module, dict[str, Any], Spread | None], None]


def plain(model: Any, batch: dict[str, Any], spread: Spread | None) -> None:
    """Compute the gradients of one batch."""
    model(**(spread.inputs(**batch) if spread else batch)).loss.backward()


def backward_twice(model: Any, batch: dict[str, Any], spread: Spread | None) -> None:
    """Accumulate the gradients of two batches, the second with fewer images."""
    for images in (5, 2):
        plain(model, images_of(batch, images), spread)


def images_of(batch: dict[str, Any], images: int) -> dict[str, Any]:
    """Return a batch with its first images only."""
    names = "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"
    fewer = {name: batch[name][:, :images] for name in names}
    fewer["cross_attention_mask"] = batch["cross_attention_mask"][:, :, :images]
    return batch | fewer


def forward_twice(model: Any, batch: dict[str, Any], spread: Spread | None) -> None:
    """Accumulate them with both forwards before the backwards."""
    others = batch | {"input_ids": batch["input_ids"].flip(0)}
    losses = [model(**(spread.inputs(**b) if spread else b)).loss for b in (batch, others)]
    sum(losses).backward()


def under_autocast(model: Any, batch: dict[str, Any], spread: Spread | None) -> None:
    """Compute in bfloat16 what autocast does."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(model, batch, spread)


def features_given(model: Any, batch: dict[str, Any], spread: Spread | None) -> None:
    """Give what a vision tower has made in place of images."""
    torch.manual_seed(1)
    names = "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"
    rest = {name: x for name, x in batch.items() if name not in names}
    features = torch.randn(2, 50, 32, dtype=torch.float64)  # 5 images of 2 tiles of 5 patches
    plain(model, rest | {"cross_attention_states": features}, spread)


def embeddings_given(model: Any, batch: dict[str, Any], spread: Spread | None) -> None:
    """Give embeddings for tokens, positions, and the number of tokens of more batches than one."""
    rows = {name: x for name, x in batch.items() if name != "input_ids"}
    rows["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"]).detach()
    rows |= {"position_ids": torch.arange(9)[None] + 2, "num_items_in_batch": 100}
    model.get_input_embeddings().requires_grad_(False)
    plain(model, rows, spread)


def checkpointed(model: Any) -> None:
    """Checkpoint every layer."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()  # without which nothing is checkpointed; there is no dropout


def frozen(model: Any) -> None:
    """Train the text model only."""
    model.model.vision_model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)


def with_adapters(model: Any) -> Any:
    """Train low-rank adapters of all projections in attention."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    return get_peft_model(model, config).to(torch.float64)


def same(model: Any) -> Any:
    """Change nothing."""
    return model


# By setting: what is done to a model before it is distributed, and after; and its step.
SETTINGS: dict[str, tuple[Callable[[Any], Any], Step]] = {
    "plain": (same, plain),
    "checkpointed": (checkpointed, plain),
    "accumulated": (same, backward_twice),
    "two forwards": (same, forward_twice),
    "autocast": (same, under_autocast),
    "frozen": (frozen, plain),
    "features": (same, features_given),
    "lora": (with_adapters, plain),
    "ddp": (same, plain),
    "fsdp2": (same, plain),
    "fsdp2 checkpointed": (checkpointed, plain),
    "fsdp2 mesh": (same, plain),
    "one image ddp": (same, plain),
    "one image fsdp2": (same, plain),
    "embeddings": (same, embeddings_given),
}


def wrapped(setting: str, model: Any, mesh: DeviceMesh) -> Any:
    """Return the model as DDP or FSDP2 train it: both average its gradients over all ranks."""
    if setting.endswith("ddp"):
        return DistributedDataParallel(model)
    if "fsdp2" in setting:
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole(x: Tensor) -> Tensor:
    """Return a gradient, put together if it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(comm: Any, setting: str, text: str, recompute: bool) -> dict[str, Any]:
    """Return how the gradients differ from those of one process."""
    before, step = SETTINGS[setting]
    dtype = torch.float32 if setting == "autocast" else torch.float64
    alone, batch, _ = make_model("mllama", dtype)
    alone = before(alone) or alone
    model = copy.deepcopy(alone)
    if setting.startswith("one image"):
        batch = images_of(batch, 1)
    batches = [batch]
    mesh = init_device_mesh("cpu", (comm.size,))
    group: Any = comm
    if setting == "fsdp2 mesh":  # each sample's images over `context`, samples over `data`
        batches = [{name: x[n : n + 1] for name, x in batch.items()} for n in range(DATA)]
        both = init_device_mesh("cpu", (DATA, CONTEXT), mesh_dim_names=("data", "context"))
        group, batch = both["context"], batches[both.get_local_rank("data")]
        mesh = both._flatten()
    for each in batches:
        step(alone, each, None)
    for p in alone.parameters():
        if p.grad is not None:
            p.grad /= len(batches)
    shares = distribute(model, group, text=text, recompute_kv=recompute)
    step(wrapped(setting, model, mesh), batch, shares)
    if not ("ddp" in setting or "fsdp2" in setting):
        shares.average_gradients()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    grads = [(p.grad, other.grad) for p, other in pairs]
    assert all((mine is None) == (other is None) for mine, other in grads)
    differences = [relative_error(whole(mine), other) for mine, other in grads if other is not None]
    found = {"gradients": max(differences), "compared": len(differences)}
    if setting == "autocast":  # whose own errors are larger: compare both with float64
        exact, batch, _ = make_model("mllama", torch.float64)
        plain(exact, batch, None)
        exactly = [p.grad for p in exact.parameters()]
        for n, name in enumerate(("gradients", "alone")):
            found[name] = distance([pair[n] for pair in grads], exactly)
    return found


def distance(grads: list[Tensor], exact: list[Tensor]) -> float:
    """Return the norm of all differences, relative to the norm of all elements.

    Roundings average out in it: it hardly depends on how a processor multiplies, unlike the worst
    of 88 gradients.
    """
    differences = [(mine - other).norm() for mine, other in zip(grads, exact, strict=True)]
    return float(torch.stack(differences).norm() / torch.stack([g.norm() for g in exact]).norm())


def main() -> None:
    """Compare in the settings that the arguments name."""
    comm, _ = start()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of peft, which names what is deprecated
    settings, texts = (argument.split(",") for argument in sys.argv[1:3])
    report = {}
    for given in itertools.product(settings, texts, (False, True)):
        report["/".join(map(str, given))] = comm.allgather(compare(comm, *given))
    if comm.rank == 0:
        print(json.dumps(report))
    finish(comm)


if __name__ == "__main__":
    main()
