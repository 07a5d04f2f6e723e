"""PyTorch's fused attention on the CPU: fp32 and fp64, grouped heads, a bias.

Not 16 bits: its exponential has 20 bits there, so that lse is worse than in fp32, and matrix
products are faster.

Pitfalls, each with a test: it rejects bool masks; a bias of another dtype than q's is read as if it
had q's; a row that sees no key gets lse 0; without queries or keys it ends the process; D_V must be
D.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lvxattn.common.masks import MaskView, tiles
from lvxattn.torch_impl.kernels import blocked
from lvxattn.torch_impl.kernels.fused import Bias, surrogate_out
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec, Sums
from lvxattn.torch_impl.merge import merge_partials

NAME = "cpu_flash"

# Above this |lse|, its rounding in fp32, 2e-6 of a weight, matters in a merge.
LARGE_LSE = 32.0

# The keys of one forward call, unless queries times keys would be fewer than `LEAST_PAIRS`.  With
# fewer than 192 queries the kernel goes through all keys for every 32 of them, and its backward
# returns dk and dv in new memory: both are slow unless the keys of a head fit a core's cache.
KEYS = 2048
LEAST_PAIRS = 2**17

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported(spec: KernelSpec) -> str | None:
    """Return None if the kernel supports a block, else what is expected."""
    wrong = spec.on("cpu", torch.float32, torch.float64) or spec.exact_bias()
    if wrong is None and spec.D_V != spec.D:
        return f"D_V = D = {spec.D}, got D_V = {spec.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `partial_attention`."""
    result: tuple[Tensor, Tensor, Tensor] | None = None
    for keys in _key_tiles(q, k, KEYS):
        k_tile, v_tile = k[:, :, keys], v[:, :, keys]
        bias = Bias.of(mask.from_key(keys.start), q, k_tile)
        out, lse = _forward(q, k_tile, v_tile, 0.0, False, attn_mask=bias.bias, scale=scale)
        if _too_large(lse):  # to be merged; blocked returns (top, total)
            return blocked.forward(q, k, v, scale=scale, mask=mask)
        partial = bias.settle(out, lse)
        result = merge_partials(*result, *partial) if result else partial
    assert result is not None
    return result


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    sums: Sums = None,
    *,
    scale: float,
    mask: MaskView,
    wanted: str = "qkv",  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `block_attention_backward`."""
    dout, out = surrogate_out(dout, delta, q.dtype)
    dq, (dk, dv) = torch.zeros_like(q), sums or (torch.zeros_like(k), torch.zeros_like(v))
    for keys in _key_tiles(q, k, KEYS // 2):  # dk and dv take as much memory
        k_tile, v_tile = k[:, :, keys], v[:, :, keys]
        bias = Bias.of(mask.from_key(keys.start), q, k_tile)
        shares = _backward(
            dout, q, k_tile, v_tile, out, bias.closed(lse), 0.0, False,
            attn_mask=bias.bias, scale=scale,
        )  # fmt: skip
        for total, share in zip((dq, dk[:, :, keys], dv[:, :, keys]), shares, strict=True):
            total += share
    return dq, dk, dv


def _key_tiles(q: Tensor, k: Tensor, size: int) -> Iterator[slice]:
    """Yield the keys of every call; more than `size` if a call would have too little work."""
    return tiles(k.shape[2], max(size, LEAST_PAIRS // q.shape[2]))


def _too_large(lse: Tensor) -> bool:
    if isinstance(lse, FakeTensor):  # has a shape, but no numbers
        return False
    return bool(((abs(lse) > LARGE_LSE) & (lse != -torch.inf)).any())
