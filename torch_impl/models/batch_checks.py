"""Checks of a model and a batch before the batch is cut."""

import hashlib
from typing import Any

from torch import Tensor, nn

from lvxattn.torch_impl.group import Group


def check_equal(batch: dict[str, Any], group: Group) -> None:
    """Check that all ranks were given the same batch; of floats only the shapes.  Collective."""
    mine = {name: fingerprint(x) for name, x in sorted(batch.items())}
    for rank, theirs in enumerate(every := group.allgather(mine)):
        for name in {**every[0], **theirs}:
            if every[0].get(name) != theirs.get(name):
                raise ValueError(
                    f"{name}: expected the same batch on all ranks, got {every[0].get(name)} "
                    f"on rank 0 and {theirs.get(name)} on rank {rank}"
                )


def fingerprint(x: Any) -> str:
    """Describe an argument of a batch: whole numbers by their values, real ones by their shape."""
    if isinstance(x, tuple | list):
        return f"({', '.join(map(fingerprint, x))})"
    if not isinstance(x, Tensor):
        return repr(x) if isinstance(x, bool | int | float | str) else type(x).__name__
    what = f"{tuple(x.shape)} {x.dtype}"
    if x.is_floating_point():
        return what
    digest = hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes())
    return f"{what} {digest.hexdigest()[:8]}"


def refuse_dropout(model: nn.Module) -> None:
    """Check that nothing is dropped: ranks that all have the text would drop different elements."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        rates = {key: x for key, x in vars(module).items() if "drop" in key}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        for key, rate in rates.items():
            if isinstance(rate, float) and rate > 0:
                raise ValueError(
                    f"dropout: expected 0 in training with text='replicated', got {rate} as {key} "
                    f"of {name or type(model).__name__}"
                )
