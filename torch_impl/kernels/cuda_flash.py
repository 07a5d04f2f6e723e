"""FlashAttention-2 as PyTorch ships it for CUDA: bf16 and fp16, no mask.

Conventions, from PyTorch's source: lse is (B, H, s_q), fp32, natural log, and +inf where a row sees
no keys (as a user would find them; they are -inf here); D is a multiple of 8 up to 256 and D_V = D;
the backward wants a generator's state even without dropout, and reads nothing from it.  Of grouped
heads it would make too much: they are folded.
"""

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels.bias import Bias
from lvxattn.torch_impl.kernels.fold import fold
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec, accumulator_of
from lvxattn.torch_impl.kernels.surrogate_out import surrogate_out

NAME = "cuda_flash"

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


def unsupported(job: KernelSpec) -> str | None:
    """Say why the kernel cannot do the job."""
    wrong = job.on("cuda", torch.bfloat16, torch.float16) or job.since_ampere()
    wrong = wrong or job.room_for_stand_in()
    if wrong is None and job.mask != "none":
        return f"no mask, got a mask of kind {job.mask}"
    if wrong is None and not (job.D_V == job.D <= 256 and job.D % 8 == 0):
        return f"D_V = D, a multiple of 8 up to 256, got D = {job.D}, D_V = {job.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `partial_attention` does."""
    assert mask.mask is None
    out, lse = _forward(fold(q, k), k, v, 0.0, False, False, scale=scale)[:2]
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return Bias(None, None).settle(out.to(accumulator_of(q)), lse)


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
    assert mask.mask is None
    lse = Bias(None, None).closed(lse)
    rows, dout, out, lse = (fold(x, k) for x in (q, *surrogate_out(dout, delta, q.dtype), lse))
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _backward(
        dout, rows, k, v, out, lse, None, None, rows.shape[2], k.shape[2],
        0.0, False, state, state[0], scale=scale,
    )  # fmt: skip
    return dq.reshape(q.shape).to(accumulator_of(q)), dk, dv
