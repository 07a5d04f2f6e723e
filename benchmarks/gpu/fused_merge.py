"""The merge as one Triton kernel: every number is read and written once.

A program merges a few rows of out, D_V numbers each, and their lse; rows are independent.  Requires
Triton.
"""

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _merge_rows(  # type: ignore[no-untyped-def]
    out_a, lse_a, out_b, lse_b, out, lse, D_V, rows, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    there = row < rows
    at = row.to(tl.int64)[:, None] * D_V + column[None, :]
    inside = there[:, None] & (column < D_V)[None, :]
    a = tl.load(lse_a + row, mask=there, other=float("-inf"))
    b = tl.load(lse_b + row, mask=there, other=float("-inf"))
    # Relative to 0 where both are -inf: then both weights are 0, and nothing is NaN.
    largest = tl.maximum(a, b)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a, weight_b = tl.exp(a - base), tl.exp(b - base)
    total = weight_a + weight_b
    scale = tl.where(total > 0, 1.0 / total, 0.0)
    x = tl.load(out_a + at, mask=inside, other=0.0)
    y = tl.load(out_b + at, mask=inside, other=0.0)
    joined = (weight_a * scale)[:, None] * x + (weight_b * scale)[:, None] * y
    tl.store(out + at, joined, mask=inside)
    # log(0) = -inf is intended.
    tl.store(lse + row, base + tl.log(total), mask=there)


def fused_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge like `lvxattn.torch_impl.merge`, for contiguous fp32 tensors on CUDA."""
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    rows, D_V = lse.numel(), out.shape[-1]
    block = 4
    grid = (triton.cdiv(rows, block),)
    _merge_rows[grid](
        out_a, lse_a, out_b, lse_b, out, lse, D_V, rows,
        BLOCK_ROWS=block, BLOCK_D=triton.next_power_of_2(D_V),
    )  # fmt: skip
    return out, lse
