"""PyTorch's fused attention on the CPU: fp32 and fp64, grouped heads, a bias.

Not 16 bits: its exponential has 20 bits there, so that lse is worse than in fp32, and matrix
products are faster.

Pitfalls, each with a test: it rejects bool masks; a bias of another dtype than q's is read as if it
had q's; a row that sees no key gets lse 0; without queries or keys it ends the process; D_V must be
D.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels import blocked
from lvxattn.torch_impl.kernels.fused import Bias, surrogate_out
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec

NAME = "cpu_flash"

# Above this |lse|, its rounding in fp32, 2e-6 of a weight, matters in a merge.
LARGE_LSE = 32.0

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
    bias = Bias.of(mask, q, k)
    out, lse = _forward(q, k, v, 0.0, False, attn_mask=bias.bias, scale=scale)
    if _too_large(lse):  # to be merged; tiles return (top, total)
        return blocked.forward(q, k, v, scale=scale, mask=mask)
    return bias.settle(out, lse)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    scale: float,
    mask: MaskView,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `block_attention_backward`."""
    bias = Bias.of(mask, q, k)
    dout, out = surrogate_out(dout, delta, q.dtype)
    dq, dk, dv = _backward(
        dout, q, k, v, out, bias.closed(lse), 0.0, False, attn_mask=bias.bias, scale=scale
    )
    return dq, dk, dv


def _too_large(lse: Tensor) -> bool:
    if isinstance(lse, FakeTensor):  # has a shape, but no numbers
        return False
    return bool(((abs(lse) > LARGE_LSE) & (lse != -torch.inf)).any())
