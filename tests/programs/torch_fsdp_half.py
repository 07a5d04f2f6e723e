"""FSDP2 in half precision, held against one process; prints as `fsdp_models.report` says."""

import copy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lvxattn.torch_impl import CrossAttention, shard
from lvxattn.torch_impl.examples.fully_sharded import gradients, whole
from lvxattn.torch_impl.examples.two_dimensional_mesh import divisor, part, summed_loss
from tests.cases import Case
from tests.fsdp_models import BF16, Checks, Found, a_batch, alone_gradients, meshes, models, report
from tests.naive import naive_attention
from tests.tolerances import UNIT, limits


def half_precision_errs_as_in_one_process(mesh: DeviceMesh) -> Found:
    """The errors of gradients, as norms: of the sharded model over those of one process.

    And gradients are added up in float32: their sums are no numbers of bfloat16.
    """
    found: Found = {}
    batch = a_batch()
    mine = part(batch, mesh)
    count = divisor(mine.targets, "all")
    for name, over in meshes(mesh).items():
        model, alone = models(mesh, over, torch.float32, mp_policy=BF16)
        exactly = alone_gradients(copy.deepcopy(alone).double(), batch)
        logits = model(mine.tokens, mine.frames.float())
        share = summed_loss(logits.float(), mine.targets) / count
        (share * dist.get_world_size()).backward()
        grads = [whole(grad) for grad in gradients(model)]

        alone.bfloat16()
        logits = alone(batch.tokens, batch.frames.bfloat16())
        (summed_loss(logits.float(), batch.targets) / count).backward()
        of_keys = whole(model.layers[0].k_proj.weight.grad)
        found |= {
            f"{name}: of one process": distance(gradients(alone), exactly),
            f"{name}: sharded": distance(grads, exactly),
            f"{name}: float32": {grad.dtype for grad in grads} == {torch.float32},
            f"{name}: no bf16": float((of_keys != of_keys.bfloat16()).double().mean()),
        }
    return found


def one_layer_in_half_precision(mesh: DeviceMesh) -> Found:
    """Its result against float64, over the limit of what rounds; and inputs that are not cast."""
    torch.manual_seed(0)
    E, H, S_Q, S_KV = 32, 4, 13, 40
    layer = CrossAttention(E, H, group=mesh["context"])
    nn.init.eye_(layer.out_proj.weight)  # so that the result is that of the attention
    # No result is near 0 for what cancels, and no rank's keys are like another's.
    nn.init.uniform_(layer.v_proj.weight, 0, 0.2)
    ramp = torch.linspace(0.1, 1, S_KV)[:, None]
    x, features = (a.bfloat16().float() for a in (torch.randn(2, S_Q, E), torch.rand(2, S_KV, E)))
    features = (features * ramp).bfloat16().float()
    for p in layer.parameters():
        p.data = p.data.bfloat16().float()
    w_q, w_k, w_v = (p.weight.detach().double() for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = (
        (y.double() @ w.T).unflatten(2, (H, -1)).transpose(1, 2).numpy()
        for y, w in ((x, w_q), (features, w_k), (features, w_v))
    )
    case = Case("half", B=2, H=H, H_KV=H, S_Q=S_Q, S_KV=S_KV, D=E // H, D_V=E // H)
    zeros = np.zeros_like(q)
    truth = naive_attention(q, k, v, (E // H) ** -0.5, None, zeros, zeros[..., 0])
    # Queries and keys are rounded, which moves scores, and lse, and so are values.
    extra = UNIT["bfloat16"] * (2 * 2 * truth.largest_score + 1) * truth.sizes["out"]
    limit = limits(case, truth, "bfloat16", "float32")["out"] + extra

    def heads_joined(a: Any) -> Tensor:
        return shard(torch.from_numpy(a).transpose(1, 2).flatten(2), mesh["context"], axis=1)

    parts = [shard(a, mesh["context"], axis=1).contiguous() for a in (x, features)]
    fully_shard(layer, mesh=meshes(mesh)["flat"], mp_policy=BF16)
    out = layer(*parts)
    off = (out.detach().double() - heads_joined(truth.results["out"])).abs() / heads_joined(limit)
    found: Found = {"in bf16": out.dtype == torch.bfloat16, "of its limit": float(off.max())}

    as_given = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for what, dtypes in {
        "features in another dtype": (torch.bfloat16, torch.float32),
        "inputs in float32": (torch.float32, torch.float32),
    }.items():
        layer = CrossAttention(E, H, group=mesh["context"])
        fully_shard(layer, mesh=meshes(mesh)["flat"], mp_policy=as_given)
        try:
            layer(*(a.to(dtype) for a, dtype in zip(parts, dtypes, strict=True)))
        except (RuntimeError, TypeError, ValueError) as error:
            found[what] = f"{type(error).__name__}: {error}"
    return found


def distance(grads: list[Tensor], exact: list[Tensor]) -> float:
    """Return the norm of all differences, relative to the norm of all elements."""
    differences = [(mine - other).norm() for mine, other in zip(grads, exact, strict=True)]
    return float(torch.stack(differences).norm() / torch.stack([g.norm() for g in exact]).norm())


CHECKS: Checks = {
    check.__name__: check
    for check in (half_precision_errs_as_in_one_process, one_layer_in_half_precision)
}
report(CHECKS)
