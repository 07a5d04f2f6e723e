"""Memory-efficient attention (CUTLASS) as PyTorch ships it for CUDA: fp32 too, D_V != D, a bias.

Conventions, from PyTorch's source: no grouped heads in the supported versions, so that they are
folded; lse is (B, H, s_q rounded up to a multiple of 32), fp32, natural log, padded with +inf; a
bias is in q's dtype, expanded by strides, its rows aligned to 16 elements in memory.
"""

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels.fused import Bias, fold, surrogate_out
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec, Sums, accumulator_of, added

NAME = "efficient"

_forward = torch.ops.aten._scaled_dot_product_efficient_attention
_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward


def unsupported(spec: KernelSpec) -> str | None:
    """Return None if the kernel supports a block, else what is expected."""
    wrong = spec.on("cuda", torch.float32, torch.bfloat16, torch.float16)
    wrong = wrong or spec.exact_bias() or spec.room_for_surrogate_out()
    step = 4 if spec.dtype == torch.float32 else 8
    if wrong is None and (spec.D % step or spec.D_V % step):
        return f"D and D_V multiples of {step}, got D = {spec.D}, D_V = {spec.D_V}"
    return wrong


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `partial_attention`."""
    bias = Bias.of(mask, q, k)
    rows = fold(q, k)
    out, lse = _forward(rows, k, v, _aligned(bias.bias, q, k), True, 0.0, False, scale=scale)[:2]
    lse = lse[:, :, : rows.shape[2]].reshape(q.shape[:3])  # (B, H, s_q)
    out = out.reshape(*q.shape[:3], v.shape[3])  # (B, H, s_q, D_V)
    return bias.settle(out.to(accumulator_of(q)), lse)


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
    dout, out = surrogate_out(dout, delta, q.dtype)
    lse = fold(bias.closed(lse), k)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = _backward(
        fold(dout, k), fold(q, k), k, v, _aligned(bias.bias, q, k), fold(out, k), lse, seed,
        seed, 0.0, [True, True, True, False], False, scale=scale,
    )  # fmt: skip
    dq = dq.reshape(q.shape).to(accumulator_of(q))  # (B, H, s_q, D)
    return dq, *added(sums, dk, dv)


def _aligned(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the bias as (B, H_KV, G s_q, s_kv), with aligned rows.

    It takes as much memory as the mask, times G if that has one head.
    """
    if bias is None:
        return None
    s_kv, G = bias.shape[3], q.shape[1] // k.shape[1]
    bias = torch.nn.functional.pad(bias, (0, -s_kv % 16))  # (..., s_kv + padding)
    if bias.shape[1] != 1:
        bias = fold(bias.expand(-1, -1, q.shape[2], -1), k)  # (..., H_KV, G s_q, s_kv + padding)
    elif bias.shape[2] != 1:
        # (..., 1, G s_q, s_kv + padding)
        bias = bias.expand(-1, G, -1, -1).reshape(bias.shape[0], 1, -1, bias.shape[3])
    # (B, H_KV, G s_q, s_kv)
    return bias[..., :s_kv].expand(q.shape[0], k.shape[1], G * q.shape[2], -1)
