"""For few queries and many keys: split the keys into parts that are processed in parallel.

A fused forward divides its work by batch entry, head and rows of queries, CPU flash's backward by
batch entry and key-value head.  With few of those, part of the machine is idle.  Here the keys of a
batch entry are viewed as several entries, which any kernel accepts, and the results are merged.  In
the backward the shares of dq are added; those of dk and dv are of different keys.

    k (H_KV, parts * n, D) -> (parts, H_KV, n, D), a view       q (H, s_q, D) -> (parts, H, s_q, D)

The rest of the keys, fewer than `parts`, goes through the kernel alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl.kernels import blocked, cpu_flash, cuda_flash, cudnn, efficient
from lvxattn.torch_impl.kernels.kernel_spec import Kernel, KernelSpec, Sums, accumulator_of, added
from lvxattn.torch_impl.merge import merge_partials

NAME = "split"

# The first of these that supports the block is used.
WITHIN: tuple[Kernel, ...] = (cpu_flash, cuda_flash, cudnn, efficient, blocked)
# The least keys in a part.
LEAST_KEYS = 512
# The number of tasks that keep a device busy: about its number of multiprocessors.
BUSY = 128
ROWS = 128  # that a kernel assigns to one worker

_NO_MASK = MaskView(None)


def unsupported(spec: KernelSpec) -> str | None:
    """Return None if the kernel supports a block, else what is expected."""
    return None if spec.mask == "none" else f"no mask, got a mask of kind {spec.mask}"


def parts_for(spec: KernelSpec) -> int:
    """Return the number of parts for the keys of one batch entry."""
    if spec.device != "cpu" and spec.backward:  # divides its work by keys anyway
        return 1
    workers = torch.get_num_threads() if spec.device == "cpu" else BUSY
    if spec.device != "cpu":  # a group's heads are folded
        shares = spec.H_KV * -(-spec.H // spec.H_KV * spec.s_q // ROWS)
    else:
        shares = spec.H_KV if spec.backward else spec.H * -(-spec.s_q // ROWS)
    return max(1, min(-(-workers // shares), spec.s_kv // LEAST_KEYS))


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `partial_attention`."""
    spec, kernel = _within(q, k, v, mask, backward=False)
    results = []
    for b in range(spec.B):
        out = torch.zeros((1, *q.shape[1:3], v.shape[3]), dtype=accumulator_of(q), device=q.device)
        top = torch.full(out.shape[:3], -torch.inf, dtype=out.dtype, device=q.device)
        result = out, top, torch.zeros_like(top)
        for parts, keys in _cuts(parts_for(spec), spec.s_kv):
            k_parts, v_parts = (_parts(x[b, :, keys], parts) for x in (k, v))
            q_parts = _repeated(q[b], parts)
            part = kernel.forward(q_parts, k_parts, v_parts, scale=scale, mask=_NO_MASK)
            result = merge_partials(*result, *_joined(*part))
        results.append(result)
    # (B, H, s_q, ...)
    out, top, total = (torch.cat(entries) for entries in zip(*results, strict=True))
    return out, top, total


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
    spec, kernel = _within(q, k, v, mask, backward=True)
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulator_of(q), device=q.device) for x in (q, k, v))
    for b in range(spec.B):
        for parts, keys in _cuts(parts_for(spec), spec.s_kv):
            rows = (_repeated(x[b], parts) for x in (dout, q, lse, delta))
            dout_parts, q_parts, lse_parts, delta_parts = rows
            k_parts, v_parts = (_parts(x[b, :, keys], parts) for x in (k, v))
            dq_parts, dk_parts, dv_parts = kernel.backward(
                dout_parts, q_parts, k_parts, v_parts, lse_parts, delta_parts,
                scale=scale, mask=_NO_MASK,
            )  # fmt: skip
            dq[b] += dq_parts.sum(dim=0)
            for whole, shares in ((dk, dk_parts), (dv, dv_parts)):
                _parts(whole[b, :, keys], parts).copy_(shares)
    return dq, *added(sums, dk, dv)


def _within(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskView, *, backward: bool
) -> tuple[KernelSpec, Kernel]:
    spec = KernelSpec.of(q, k, v, mask, backward=backward)
    return spec, next(kernel for kernel in WITHIN if kernel.unsupported(spec) is None)


def _cuts(parts: int, s_kv: int) -> Iterator[tuple[int, slice]]:
    """Yield numbers of parts, and the keys to split into as many."""
    even = s_kv - s_kv % parts
    yield parts, slice(0, even)
    if even < s_kv:
        yield 1, slice(even, s_kv)


def _joined(outs: Tensor, tops: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge all parts (parts, ...) into (1, ...) at once, to save launches on a device."""
    top = tops.amax(dim=0, keepdim=True)
    # As in `merge_partials`: where all are -inf, all weights are 0 and nothing is NaN.
    base = torch.where(top == -torch.inf, 0.0, top)
    weights = totals * torch.exp(tops - base)
    total = weights.sum(dim=0, keepdim=True)
    shares = (weights / torch.where(total == 0, 1.0, total))[..., None]
    return (shares * outs).sum(dim=0, keepdim=True), top, total


def _repeated(x: Tensor, parts: int) -> Tensor:
    """Return copies of x for every part, as not all kernels support strides of 0."""
    return x.expand(parts, *x.shape).contiguous()  # (parts, ...)


def _parts(x: Tensor, parts: int) -> Tensor:
    """View keys (H_KV, parts * n, D) as parts."""
    return x.view(x.shape[0], parts, -1, x.shape[2]).transpose(0, 1)  # (parts, H_KV, n, D)
