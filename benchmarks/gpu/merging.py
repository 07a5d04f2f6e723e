"""The merge: as PyTorch's elementwise operators, compiled, and as one Triton kernel.

Its time matters relative to the attention of a hop, which is measured with it.  A row shows what a
fused kernel would save of a hop; torch_impl gets one only if that is worth it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import Device

from lvxattn.torch_impl import block_attention, merge


def measure(device: Device) -> list[dict[str, Any]]:
    """Return a row for each number of queries: seconds by way, and the largest difference."""
    rows = []
    H, s_kv, D = (4, 256, 16) if device.tiny else (32, 75_000, 128)
    for s_q in (8, 40) if device.tiny else (64, 512, 2048):
        parts = [
            (
                device.randn(1, H, s_q, D, dtype=torch.float32),
                10 * device.randn(1, H, s_q, dtype=torch.float32),
            )
            for _ in range(2)
        ]
        (out_a, lse_a), (out_b, lse_b) = parts
        lse_a[:, :, 0] = lse_b[:, :, 0] = -torch.inf
        lse_b[:, :, 1] = -torch.inf
        out_a[:, :, 0] = out_b[:, :, 0] = 0
        out_b[:, :, 1] = 0
        want = merge(out_a, lse_a, out_b, lse_b)
        q = device.randn(1, H, s_q, D)
        k, v = (device.randn(1, H // 4, s_kv, D) for _ in range(2))
        block = device.seconds([partial(block_attention, q, k, v, scale=D**-0.5)])
        seconds: dict[str, float] = {}
        differs: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name, make in ways(device):
            try:
                work = partial(make(), out_a, lse_a, out_b, lse_b)
                out, lse = work()
                finite = want[1].isfinite()
                assert torch.equal(lse.isfinite(), finite), "other rows are dead"
                differs[name] = max(
                    float((out - want[0]).abs().max()),
                    float((lse - want[1])[finite].abs().max()),
                )
                seconds[name] = device.seconds([work])
            except Exception as error:  # a compiler may raise anything
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        bytes_ = 3 * (out_a.nbytes + lse_a.nbytes)
        rows.append(
            {
                "H": H,
                "s_q": s_q,
                "s_kv": s_kv,
                "D": D,
                "bytes": bytes_,
                "seconds": seconds,
                "differs by": differs,
                "block seconds": block,
                "failed": failed,
            }
        )
    return rows


def ways(device: Device) -> list[tuple[str, Callable[[], Callable[..., Any]]]]:
    """Return the ways to merge by name, each with a function that makes it."""
    found: list[tuple[str, Callable[[], Callable[..., Any]]]] = [("operators", lambda: merge)]
    if not device.tiny:  # a compiler for the CPU takes longer than a rehearsal may
        found += [("torch.compile", lambda: torch.compile(merge)), ("triton", _fused)]
    return found


def _fused() -> Callable[..., Any]:
    from fused_merge import fused_merge

    return fused_merge
