"""CuDNN's fused attention: bf16 and fp16, grouped heads, a bias.

Conventions, from PyTorch's source: lse is (B, H, s_q, 1), fp32, natural log; a bias in q's dtype is
expanded to (B, H or 1, s_q, s_kv) by strides; D and D_V are multiples of 8 up to 128; the backward
wants the generator's seed and offset even without dropout.  Of grouped heads its backward makes too
much, and they are folded wherever the bias is the same for all rows.
"""

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels.bias import Bias
from lvxattn.torch_impl.kernels.fold import fold
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec, accumulator_of
from lvxattn.torch_impl.kernels.surrogate_out import surrogate_out

NAME = "cudnn"

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def unsupported(job: KernelSpec) -> str | None:
    """Say why the kernel cannot do the job."""
    wrong = job.on("cuda", torch.bfloat16, torch.float16) or job.since_ampere()
    wrong = wrong or job.exact_bias() or job.room_for_stand_in()
    if wrong is None and not (max(job.D, job.D_V) <= 128 and job.D % 8 == 0 == job.D_V % 8):
        return f"D and D_V multiples of 8 up to 128, got D = {job.D}, D_V = {job.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `partial_attention` does."""
    bias = Bias.of(mask, q, k)
    rows = _fold(q, k, bias)
    out, lse = _forward(rows, k, v, bias.bias, True, 0.0, False, False, scale=scale)[:2]
    out = out.reshape(*q.shape[:3], v.shape[3])
    return bias.settle(out.to(accumulator_of(q)), lse.reshape(q.shape[:3]))


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
    lse = bias.closed(lse)[..., None].contiguous()
    given = q, *surrogate_out(dout, delta, q.dtype), lse
    rows, dout, out, lse = (_fold(x, k, bias) for x in given)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = _backward(
        dout, rows, k, v, out, lse, seed, seed, bias.bias, None,
        None, rows.shape[2], k.shape[2], 0.0, False, scale=scale,
    )  # fmt: skip
    return dq.reshape(q.shape).to(accumulator_of(q)), dk, dv


def _fold(x: Tensor, k: Tensor, bias: Bias) -> Tensor:
    """Fold the heads of a group, if the bias is the same for all of their rows."""
    alike = bias.bias is None or bias.bias.shape[1:3] == (1, 1)
    return fold(x, k) if alike else x
