"""FlashAttention-2 as PyTorch ships it for CUDA: bf16 and fp16, no mask.

Conventions, from PyTorch's source: lse is (B, H, s_q), fp32, natural log, and +inf where a row sees
no key (here -inf); D is a multiple of 8 up to 256, and D_V = D; the backward requires a generator's
state even without dropout, and does not read it.  Grouped heads, which would cost memory, are
folded.
"""

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels.fused import Bias, fold, surrogate_out
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec, Sums, accumulator_of, added

NAME = "cuda_flash"

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


def unsupported(spec: KernelSpec) -> str | None:
    """Return None if the kernel supports a block, else what is expected."""
    wrong = spec.on("cuda", torch.bfloat16, torch.float16) or spec.since_ampere()
    wrong = wrong or spec.room_for_surrogate_out()
    if wrong is None and spec.mask != "none":
        return f"no mask, got a mask of kind {spec.mask}"
    if wrong is None and not (spec.D_V == spec.D <= 256 and spec.D % 8 == 0):
        return f"D_V = D, a multiple of 8 up to 256, got D = {spec.D}, D_V = {spec.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `partial_attention`."""
    assert mask.mask is None
    out, lse = _forward(fold(q, k), k, v, 0.0, False, False, scale=scale)[:2]
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])  # (B, H, s_q, D), (B, H, s_q)
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return Bias(None, None).settle(out.to(accumulator_of(q)), lse)


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
    assert mask.mask is None
    lse = Bias(None, None).closed(lse)
    rows, dout, out, lse = (fold(x, k) for x in (q, *surrogate_out(dout, delta, q.dtype), lse))
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _backward(
        dout, rows, k, v, out, lse, None, None, rows.shape[2], k.shape[2],
        0.0, False, state, state[0], scale=scale,
    )  # fmt: skip
    dq = dq.reshape(q.shape).to(accumulator_of(q))  # (B, H, s_q, D)
    return dq, *added(sums, dk, dv)
