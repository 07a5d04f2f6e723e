"""CuDNN's fused attention: bf16 and fp16, grouped heads, a bias.

Conventions, from PyTorch's source: lse is (B, H, s_q, 1), fp32, natural log; a bias in q's dtype is
expanded to (B, H or 1, s_q, s_kv) by strides; D and D_V are multiples of 8 up to 128; the backward
requires the generator's seed and offset even without dropout.  Grouped heads, whose backward would
cost memory, are folded where the bias is the same for all rows.
"""

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels.fused import Bias, fold, surrogate_out
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec, Sums, accumulator_of, added

NAME = "cudnn"

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def unsupported(spec: KernelSpec) -> str | None:
    """Return None if the kernel supports a block, else what is expected."""
    wrong = spec.on("cuda", torch.bfloat16, torch.float16) or spec.since_ampere()
    wrong = wrong or spec.exact_bias() or spec.room_for_surrogate_out()
    if wrong is None and not (max(spec.D, spec.D_V) <= 128 and spec.D % 8 == 0 == spec.D_V % 8):
        return f"D and D_V multiples of 8 up to 128, got D = {spec.D}, D_V = {spec.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `partial_attention`."""
    bias = Bias.of(mask, q, k)
    rows = _fold(q, k, bias)
    out, lse = _forward(rows, k, v, bias.bias, True, 0.0, False, False, scale=scale)[:2]
    out = out.reshape(*q.shape[:3], v.shape[3])  # (B, H, s_q, D_V)
    return bias.settle(out.to(accumulator_of(q)), lse.reshape(q.shape[:3]))


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
    bias = Bias.of(mask, q, k)
    lse = bias.closed(lse)[..., None].contiguous()
    given = q, *surrogate_out(dout, delta, q.dtype), lse
    rows, dout, out, lse = (_fold(x, k, bias) for x in given)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = _backward(
        dout, rows, k, v, out, lse, seed, seed, bias.bias, None,
        None, rows.shape[2], k.shape[2], 0.0, False, scale=scale,
    )  # fmt: skip
    dq = dq.reshape(q.shape).to(accumulator_of(q))  # (B, H, s_q, D)
    return dq, *added(sums, dk, dv)


def _fold(x: Tensor, k: Tensor, bias: Bias) -> Tensor:
    """Fold the heads of a group, if the bias is the same for all of their rows."""
    alike = bias.bias is None or bias.bias.shape[1:3] == (1, 1)
    return fold(x, k) if alike else x
