"""CuDNN's fused attention: bf16 and fp16, grouped heads, a bias.

Conventions, from PyTorch's source: lse is (B, H, s_q, 1), fp32, natural log; a bias in q's dtype is
expanded to (B, H or 1, s_q, s_kv) by strides; D and D_V are multiples of 8 up to 128; the backward
wants the generator's seed and offset even without dropout.
"""

import torch
from torch import Tensor

from lvxattn.reference.masks import MaskView
from lvxattn.torch_impl.kernels.bias import Bias
from lvxattn.torch_impl.kernels.job import Job, accumulator_of
from lvxattn.torch_impl.kernels.stand_in import stand_in

NAME = "cudnn"

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def unsupported(job: Job) -> str | None:
    """Say why the kernel cannot do the job."""
    wrong = job.on("cuda", torch.bfloat16, torch.float16) or job.since_ampere()
    wrong = wrong or job.exact_bias() or job.room_for_stand_in()
    if wrong is None and not (max(job.D, job.D_V) <= 128 and job.D % 8 == 0 == job.D_V % 8):
        return f"D and D_V multiples of 8 up to 128, got D = {job.D}, D_V = {job.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor]:
    """Do what `block_attention` does."""
    bias = Bias.of(mask, q, k)
    out, lse = _forward(q, k, v, bias.bias, True, 0.0, False, False, scale=scale)[:2]
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
    dout, out = stand_in(dout, delta, q.dtype)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = _backward(
        dout, q, k, v, out, bias.closed(lse)[..., None].contiguous(), seed, seed, bias.bias, None,
        None, q.shape[2], k.shape[2], 0.0, False, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x.to(accumulator_of(q)) for x in grads)
    return dq, dk, dv
