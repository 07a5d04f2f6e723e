"""Grouped heads as plain ones: a group's query heads laid one under the other, as rows of one head.

    q (B, H, s_q, D) -> (B, H_KV, G s_q, D), the same bytes        G = H / H_KV

Without a mask rows know nothing of one another, so that nothing is different but the work: keys
are read once for a group, tiles of rows are full where s_q is short, and the sums over a group's
heads are the kernel's own sums over rows.  Given grouped heads, PyTorch's flash (mha_bwd in
flash_api.cpp) and cuDNN make dk and dv of every query head first, G times the memory of k and v,
and add them up in 16 bits.
"""

from torch import Tensor


def fold(x: Tensor, k: Tensor) -> Tensor:
    """Return x (B, H, s_q, ...) as (B, H_KV, G s_q, ...), H_KV being that of k."""
    return x.reshape(x.shape[0], k.shape[1], -1, *x.shape[3:])
