"""Errors of results in half precision against fp64, over the number of key shards.

Virtual shards on one device, merged by `merge`.  The unit is the error of rounding the fp64 result
itself, which a result in half precision cannot beat; all errors are root mean squares.  The goal is
below 2, independent of the number of shards.
"""

from itertools import pairwise
from typing import Any

import torch
from timing import Device
from torch import Tensor

from lvxattn.torch_impl import block_attention, block_attention_backward, merge

SHARDS = (1, 2, 4, 8, 16, 32, 64)


def measure(device: Device) -> list[dict[str, Any]]:
    """Return a row for each dtype and number of shards: errors over that of rounding, by result."""
    rows = []
    H, H_KV, s_q, s_kv, D = (2, 1, 8, 256, 16) if device.tiny else (8, 2, 128, 32_768, 128)
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        q, dout = (device.randn(1, H, s_q, D, dtype=dtype) for _ in range(2))
        k, v = (device.randn(1, H_KV, s_kv, D, dtype=dtype) for _ in range(2))
        truth = solve(*(x.double() for x in (q, k, v, dout)), 1, torch.float64)
        floor = {name: off(x.to(dtype), x) for name, x in truth.items()}
        for shards in SHARDS:
            found = solve(q, k, v, dout, shards, dtype)
            ratios = {name: off(found[name], x) / floor[name] for name, x in truth.items()}
            name = str(dtype).removeprefix("torch.")
            rows.append({"dtype": name, "shards": shards, "goal": 2.0, "over the floor": ratios})
    return rows


def solve(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shards: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return all results, in the dtype that a rank returns."""
    scale = q.shape[3] ** -0.5
    kernel = "blocked" if dtype == torch.float64 else "auto"
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    cuts = [k.shape[2] * i // shards for i in range(shards + 1)]
    for a, b in pairwise(cuts):
        part = block_attention(q, k[:, :, a:b], v[:, :, a:b], scale=scale, kernel=kernel)
        out, lse = merge(out, lse, *part)
    out = out.to(dtype)
    delta = (dout.to(wide) * out).sum(dim=-1)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dk, dv = (torch.empty_like(x) for x in (k, v))
    for a, b in pairwise(cuts):
        given = dout, q, k[:, :, a:b], v[:, :, a:b], lse, delta
        part = block_attention_backward(*given, scale=scale, kernel=kernel)
        dq += part[0]
        for whole, share in ((dk, part[1]), (dv, part[2])):
            whole[:, :, a:b] = share
    return {"out": out, "dq": dq.to(dtype), "dk": dk, "dv": dv}


def off(x: Tensor, truth: Tensor) -> float:
    """Return the root mean square error, relative to the truth's root mean square."""
    return float(((x.double() - truth).square().mean() / truth.square().mean()).sqrt())
