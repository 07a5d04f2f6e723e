r"""Attention of one block of queries to one rank's keys.

Keys are processed tile by tile.  Each tile gives attention over its keys alone, and
`merge_partials` joins it with the tiles before; scores are kept for one tile only.

    s = scale q k^T + mask       p = exp(s - top)      top = rowmax s
    out = p v / total            total = rowsum p      lse = top + log total

The backward needs no running maximum.  lse over all keys of all ranks is known, so that a tile's
probabilities are final,

    p  = exp(s - lse)                   dv = p^T dout
    ds = scale p (dout v^T - delta)     dq = ds k       dk = ds^T q

and the sums over tiles, blocks and ranks are plain sums.

In float32, an lse of 1e9 has lost the log of the number of keys.  With `lse_remainder`, the exact
lse less the rounded one, the true p is exp(-lse_remainder) exp(s - lse).  Gradients are linear in
dout and delta, so that `delta_of` applies the factor to those, and nothing more has to travel.

Equations: arXiv:2307.08691, algorithms 1 and 2.

This file is a front door: the steps are in `kernels/blocked.py`.  The other kernels are PyTorch's
fused ones, which process the same tiles in one call; `kernels/choose.py` chooses one.
"""

import torch
from torch import Tensor

from lvxattn.common.masks import MaskRule, MaskView
from lvxattn.common.rules import Rule

from .kernels import KERNELS
from .kernels.choose import choose
from .kernels.kernel_spec import Kernel, KernelSpec, accumulator_of
from .merge import lse_of, merge_partials


@torch.no_grad()
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: MaskView | Tensor | MaskRule | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from a block of queries to one rank's keys.  Not collective, not differentiable.

    Parameters
    ----------
    q : (B, H, s_q, D)
    k : (B, H_KV, s_kv, D)
    v : (B, H_KV, s_kv, D_V)
    scale : float
    mask : optional
        A mask of this block, or the view of a rank's mask that `Layout.view` returns.
    kernel : str
        A name in `KERNELS`, or ``"auto"``.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    lse : (B, H, s_q), accumulator dtype
        Natural log; (0, -inf) where a query may attend to no key.

    Raises
    ------
    ValueError
        There is no such kernel, or it does not support this block.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import block_attention
    >>> q, k, v = (torch.ones(1, 2, s, 8) for s in (6, 50, 50))
    >>> out, lse = block_attention(q, k, v, scale=1.0)
    >>> out.shape, lse.shape
    (torch.Size([1, 2, 6, 8]), torch.Size([1, 2, 6]))
    """
    out, top, total = partial_attention(q, k, v, scale=scale, mask=mask, kernel=kernel)
    return out, lse_of(top, total)


@torch.no_grad()
def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: MaskView | Tensor | MaskRule | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `block_attention` as a partial result, the form that `merge_partials` joins.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    top, total : (B, H, s_q), accumulator dtype
        A bound such as the largest score, and the sum of exponentiated scores divided by exp(top);
        (0, -inf, any) where a query may attend to no key.
    """
    view = MaskView.of(mask)
    if isinstance(view.mask, Rule):
        out, top, total = _nothing(q, v)
        for rows, keys, part in view.parts(q, k):
            found = partial_attention(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], scale=scale, mask=part, kernel=kernel
            )
            out[:, :, rows], top[:, :, rows], total[:, :, rows] = merge_partials(
                out[:, :, rows], top[:, :, rows], total[:, :, rows], *found
            )
        return out, top, total
    work = _kernel(kernel, KernelSpec.of(q, k, v, view, backward=False))
    if 0 in (q.shape[2], k.shape[2]):  # fused kernels would end the process
        return _nothing(q, v)
    q, k, v = (_rows(x) for x in (q, k, v))
    return work.forward(q, k, v, scale=float(scale), mask=view)


@torch.no_grad()
def block_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    *,
    scale: float,
    mask: MaskView | Tensor | MaskRule | None = None,
    wanted: str = "qkv",
    kernel: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `block_attention`, given lse and delta over all keys of all ranks.

    Not collective.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
        Rounded to q's dtype by kernels that require it.
    q, k, v, scale, mask, kernel
        As given to `block_attention`.
    lse : (B, H, s_q), accumulator dtype
        Over all keys.
    delta : (B, H, s_q), accumulator dtype
        ``rowsum(dout * out) - dlse``, out over all keys.
    dk, dv : shaped as k, v, accumulator dtype, optional
        Sums, possibly views: this block's share is added to them in place.  Default: new tensors.
    wanted : str
        The arguments whose gradients are computed: ``"qkv"``, ``"q"``, ``"kv"`` or ``""``.
    dtype : torch.dtype, optional
        Of new dk and dv.  Default: the accumulator dtype.  k's, where nothing will be added to
        them, saves memory if the kernel rounds its own sums.

    Returns
    -------
    dq : (B, H, s_q, D), accumulator dtype
        The share of these keys; 0 if not wanted.
    dk, dv : shaped as k, v
        The given ones, or new ones with the share of this block; of no keys if not wanted.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import block_attention, block_attention_backward
    >>> q, k, v = (torch.ones(1, 2, s, 8) for s in (6, 50, 50))
    >>> out, lse = block_attention(q, k, v, scale=1.0)
    >>> dout = torch.ones_like(out)
    >>> delta = (dout * out).sum(dim=-1)
    >>> dq, dk, dv = block_attention_backward(dout, q, k, v, lse, delta, scale=1.0)
    >>> torch.allclose(dv, torch.tensor(6 / 50))  # 6 queries give 50 keys equal weights
    True
    """
    view, wide = MaskView.of(mask), accumulator_of(q)
    if "k" not in wanted:  # nothing is added to them
        dk, dv = (x.new_empty((*x.shape[:2], 0, x.shape[3]), dtype=wide) for x in (k, v))
    sums = None if dk is None or dv is None else (dk, dv)
    if isinstance(view.mask, Rule):
        dq = q.new_zeros(q.shape, dtype=wide)
        dk, dv = sums or [x.new_zeros(x.shape, dtype=wide) for x in (k, v)]
        for rows, keys, part in view.parts(q, k):
            dq_part, *_ = block_attention_backward(
                dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys],
                lse[:, :, rows], delta[:, :, rows], dk[:, :, keys], dv[:, :, keys],
                scale=scale, mask=part, wanted=wanted, kernel=kernel,
            )  # fmt: skip
            dq[:, :, rows] += dq_part
        return (dq, dk, dv) if sums else (dq, dk.to(dtype or wide), dv.to(dtype or wide))
    work = _kernel(kernel, KernelSpec.of(q, k, v, view, backward=True, wanted=wanted))
    if 0 in (q.shape[2], k.shape[2]) or not wanted:
        dk, dv = sums or [x.new_zeros(x.shape, dtype=dtype or wide) for x in (k, v)]
        return q.new_zeros(q.shape, dtype=wide), dk, dv
    dout, q, k, v = (_rows(x) for x in (dout, q, k, v))
    dq, *shares = work.backward(
        dout, q, k, v, lse, delta, sums if "k" in wanted else None,
        scale=float(scale), mask=view, wanted=wanted,
    )  # fmt: skip
    # A kernel may return what is not wanted, too.
    if "q" not in wanted:
        dq = q.new_zeros(q.shape, dtype=wide)
    if "k" in wanted:
        dk, dv = shares
    assert dk is not None
    assert dv is not None
    return (dq, dk, dv) if sums else (dq, dk.to(dtype or wide), dv.to(dtype or wide))


def delta_of(
    dout: Tensor, out: Tensor, lse: Tensor, lse_remainder: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dout and delta = rowsum(dout * out) - dlse, both times exp(-lse_remainder).

    Computed once, on the queries' rank.  Both are 0 in rows that see no key (lse = -inf), even
    where dout or dlse is NaN: no gradient passes through such rows.

    Parameters
    ----------
    dout, out : (B, H, s_q, D_V)
    lse : (B, H, s_q)
        Over all keys.
    lse_remainder : (B, H, s_q), optional
        Rounding error of lse, from `lse_remainder_of`; default: 0.
    dlse : (B, H, s_q), optional

    Returns
    -------
    dout : (B, H, s_q, D_V)
    delta : (B, H, s_q), accumulator dtype
    """
    wide = accumulator_of(dout)
    dead = lse == -torch.inf
    dout = dout.masked_fill(dead[..., None], 0.0)
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    if lse_remainder is not None:
        factor = torch.exp(-lse_remainder)
        # Rounded before delta is computed from it: the two must be consistent.
        dout, dlse = (dout.to(wide) * factor[..., None]).to(dout.dtype), dlse * factor
    delta = (dout.to(wide) * out).sum(dim=-1) - dlse
    return dout, delta.masked_fill(dead, 0.0)


def _nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, top and total of no keys."""
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=accumulator_of(q))
    top = out.new_full(q.shape[:3], -torch.inf)
    return out, top, torch.zeros_like(top)


def _kernel(name: str, spec: KernelSpec) -> Kernel:
    if name == "auto":
        return KERNELS[choose(spec)]
    if name not in KERNELS:
        raise ValueError(f"kernel: expected auto, {', '.join(KERNELS)}, got {name!r:.40}")
    wrong = KERNELS[name].unsupported(spec)
    if wrong is not None:
        raise ValueError(f"kernel: expected for {name} {wrong}")
    return KERNELS[name]


def _rows(x: Tensor) -> Tensor:
    """Return x as fused kernels require it: contiguous rows, on CUDA aligned to 16 bytes."""
    # No fused kernel supports rows that are not a multiple of 16 bytes.
    if x.device.type == "cpu" or x.shape[-1] * x.element_size() % 16:
        aligned = True
    else:
        apart = [n for n, size in zip(x.stride(), x.shape[:-1], strict=False) if size > 1]
        aligned = not any(n % 16 for n in (x.data_ptr(), *(n * x.element_size() for n in apart)))
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
