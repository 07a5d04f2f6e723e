"""The overhead of a single rank: time, and memory at a million keys.

`cross_attention` with a layout, relative to the block attention that it calls; the goal is 1 %.
"""

from statistics import median
from typing import Any

import torch
from timing import Device

from lvxattn.torch_impl import Layout, block_attention, block_attention_backward, cross_attention
from lvxattn.torch_impl.block_attention import delta_of


def overhead(device: Device) -> list[dict[str, Any]]:
    """Return the time of a pass over that of the block alone: medians of interleaved pairs."""
    H, H_KV, s_q, s_kv, D = (4, 2, 8, 512, 16) if device.tiny else (32, 8, 512, 300_000, 128)
    q, dout = (device.randn(1, H, s_q, D) for _ in range(2))
    k, v = (device.randn(1, H_KV, s_kv, D) for _ in range(2))
    scale, layout = D**-0.5, Layout.agree(q, k, v)
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    out = cross_attention(*given, layout=layout)

    def pass_() -> None:
        with torch.no_grad():
            cross_attention(q, k, v, layout=layout)

    def block() -> None:
        block_attention(q, k, v, scale=scale)

    def pass_backward() -> None:
        torch.autograd.grad(out, given, dout, retain_graph=True)

    wide, lse = block_attention(q, k, v, scale=scale)
    rounded = wide.to(q.dtype)

    def block_backward() -> None:
        _, delta = delta_of(dout, rounded, lse, None, None)
        given = dout, q, k, v, lse, delta
        dq, _, _ = block_attention_backward(*given, scale=scale, dtype=k.dtype)
        dq.to(q.dtype)

    found = {}
    for name, whole, alone in (
        ("forward", pass_, block),
        ("backward", pass_backward, block_backward),
    ):
        pairs = []
        for number in range(2 if device.tiny else 7):
            # The order alternates, so that what one leaves behind affects both alike.
            order = (whole, alone) if number % 2 else (alone, whole)
            took = {work: device.seconds([work]) for work in order}
            pairs.append((took[whole] / took[alone], took[whole], took[alone]))
        found[name] = {
            "ratio": median(pair[0] for pair in pairs),
            "ratios": [pair[0] for pair in pairs],
            "seconds": median(pair[1] for pair in pairs),
            "block seconds": median(pair[2] for pair in pairs),
        }
    return [{"s_q": s_q, "s_kv": s_kv, "goal": 1.01, **found}]


def million(device: Device) -> list[dict[str, Any]]:
    """Return the peak of memory over inputs and outputs: forward, and forward and backward."""
    H, H_KV, s_q, s_kv, D = (4, 2, 8, 1000, 16) if device.tiny else (32, 8, 512, 1_000_000, 128)
    q, dout = (device.randn(1, H, s_q, D) for _ in range(2))
    k, v = (device.randn(1, H_KV, s_kv, D) for _ in range(2))
    given = [x.requires_grad_() for x in (q, k, v)]
    inputs = sum(x.nbytes for x in given)
    out_bytes = q.nbytes + 4 * H * s_q

    def forward() -> None:
        with torch.no_grad():
            cross_attention(*given)

    def both() -> None:
        torch.autograd.grad(cross_attention(*given), given, dout)

    found: dict[str, Any] = {"s_q": s_q, "s_kv": s_kv, "goal": 1.3}
    for name, work, held, results in (
        ("forward", forward, inputs, out_bytes),
        ("forward and backward", both, inputs + dout.nbytes, out_bytes + inputs),
    ):
        beyond = device.peak(work)
        found[name] = {
            "seconds": device.seconds([work]),
            "inputs and outputs": held + results,
            "peak": held + beyond,
            "ratio": (held + beyond) / (held + results),
        }
    return [found]
