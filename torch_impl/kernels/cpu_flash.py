"""PyTorch's fused attention on the CPU: fp32 and fp64, grouped heads, a bias.

Not 16 bits: there its exponential is one of 20 bits, so that lse is worse than fp32, and matrix
products are faster.

Traps, each with a test: it refuses bool masks; a bias of another dtype than q's is read as if it
had q's; a row that sees nothing gets lse 0; no queries, or no keys, end the process; D_V must be D.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels import blocked
from lvxattn.torch_impl.kernels.bias import Bias
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec
from lvxattn.torch_impl.kernels.surrogate_out import surrogate_out

NAME = "cpu_flash"

# Beyond this size the rounding of an lse in fp32, 2e-6 of a weight, would show in a merge.
LARGE_LSE = 32.0

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported(job: KernelSpec) -> str | None:
    """Say why the kernel cannot do the job."""
    wrong = job.on("cpu", torch.float32, torch.float64) or job.exact_bias()
    if wrong is None and job.D_V != job.D:
        return f"D_V = D = {job.D}, got D_V = {job.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `partial_attention` does."""
    bias = Bias.of(mask, q, k)
    out, lse = _forward(q, k, v, 0.0, False, attn_mask=bias.bias, scale=scale)
    if _too_large(lse):  # to be joined with other keys' results: the tiles give (top, total)
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
    """Do what `block_attention_backward` does."""
    bias = Bias.of(mask, q, k)
    dout, out = surrogate_out(dout, delta, q.dtype)
    dq, dk, dv = _backward(
        dout, q, k, v, out, bias.closed(lse), 0.0, False, attn_mask=bias.bias, scale=scale
    )
    return dq, dk, dv


def _too_large(lse: Tensor) -> bool:
    if isinstance(lse, FakeTensor):  # there is nothing to look at, and only shapes count
        return False
    return bool(((abs(lse) > LARGE_LSE) & (lse != -torch.inf)).any())
