r"""One block of queries against one rank's keys.

Keys are taken tile by tile.  A tile gives attention over its keys alone, and `merge_partials` joins
it with the tiles before; scores are never kept for more than one tile.

    s = scale q k^T + mask       p = exp(s - top)      top = rowmax s
    out = p v / total            total = rowsum p      lse = top + log total

The backward needs no such care: with lse over all keys of all ranks known, every tile's
probabilities are what they are in the whole,

    p  = exp(s - lse)           dv = p^T dout
    ds = p (dout v^T - delta)   dq = scale ds k    dk = scale ds^T q

so its sums over tiles, blocks and ranks are plain sums.  What lse has lost in rounding, `low`, is a
factor exp(-low) of every p of a row.  dout and delta have it instead, to which all gradients are
proportional: nothing more travels.

Equations: arXiv:2307.08691, algorithms 1 and 2.

The steps are in `kernels/blocked.py`.  The other kernels are PyTorch's fused ones, which take the
same tiles in one call; `kernels/choose.py` says when.
"""

import torch
from torch import Tensor

from lvxattn.common.masks import MaskRule, MaskView

from .kernels import KERNELS
from .kernels.choose import choose
from .kernels.kernel_spec import Kernel, KernelSpec, accumulator_of
from .merge import lse_of


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
        A mask over this block, or the view that `Layout.view` gives of a rank's mask.
    kernel : str
        The name of one of `KERNELS`, or ``"auto"``.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    lse : (B, H, s_q), accumulator dtype
        Natural log; (0, -inf) where a query may attend to none of the keys.

    Raises
    ------
    ValueError
        `kernel` is not the name of a kernel, or of one that cannot do this.
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
    """Do what `block_attention` does, with lse as the pair that `merge_partials` joins.

    Returns
    -------
    out : (B, H, s_q, D_V), accumulator dtype
    top, total : (B, H, s_q), accumulator dtype
        A bound such as the largest score, and the sum of exponentiated scores divided by exp(top);
        (0, -inf, any) where a query may attend to none of the keys.
    """
    view = MaskView.of(mask)
    work = _kernel(kernel, KernelSpec.of(q, k, v, view, backward=False))
    if 0 in (q.shape[2], k.shape[2]):  # with which fused kernels end the process
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=accumulator_of(q))
        top = out.new_full(q.shape[:3], -torch.inf)
        return out, top, torch.zeros_like(top)
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
    *,
    scale: float,
    mask: MaskView | Tensor | MaskRule | None = None,
    kernel: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `block_attention` given lse and delta over all keys of all ranks.

    Not collective.

    Parameters
    ----------
    dout : (B, H, s_q, D_V)
        Rounded to q's dtype by kernels that take nothing else.
    q, k, v, scale, mask, kernel
        As given to `block_attention`.
    lse : (B, H, s_q), accumulator dtype
        Over all keys.
    delta : (B, H, s_q), accumulator dtype
        ``rowsum(dout * out) - dlse``, out over all keys.
    dtype : torch.dtype, optional
        Of dk and dv: the accumulator's, or k's where nothing will be added to them.  Of millions of
        keys no gradient in fp32 is made then, if the kernel rounds its own.

    Returns
    -------
    dq : (B, H, s_q, D), accumulator dtype
        The share of these keys.
    dk, dv : shaped as k, v, `dtype`
        The share of this block.  Not added to what is there, as elsewhere: fused kernels return
        them new, and to zero and add would cost a rank that is alone a twentieth of its time.
    """
    view = MaskView.of(mask)
    work = _kernel(kernel, KernelSpec.of(q, k, v, view, backward=True))
    if 0 in (q.shape[2], k.shape[2]):
        dq, dk, dv = (x.new_zeros(x.shape, dtype=accumulator_of(q)) for x in (q, k, v))
    else:
        dout, q, k, v = (_rows(x) for x in (dout, q, k, v))
        dq, dk, dv = work.backward(dout, q, k, v, lse, delta, scale=float(scale), mask=view)
    return dq, dk.to(dtype or accumulator_of(q)), dv.to(dtype or accumulator_of(q))


def delta_of(
    dout: Tensor, out: Tensor, lse: Tensor, low: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dout and delta = rowsum(dout * out) - dlse, computed once, where the queries are.

    Both have the factor exp(-low), and are 0 in rows that see nothing (lse = -inf), whatever comes
    from above, NaN too: no gradient goes through them.

    Parameters
    ----------
    dout, out : (B, H, s_q, D_V)
    lse : (B, H, s_q)
        Over all keys.
    low : (B, H, s_q), optional
        What lse has lost in rounding (`remainder_of`); 0 unless given.
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
    if low is not None:
        factor = torch.exp(-low)
        # Rounded to its dtype before delta is taken from it: the two must fit each other.
        dout, dlse = (dout.to(wide) * factor[..., None]).to(dout.dtype), dlse * factor
    delta = (dout.to(wide) * out).sum(dim=-1) - dlse
    return dout, delta.masked_fill(dead, 0.0)


def _kernel(name: str, job: KernelSpec) -> Kernel:
    if name == "auto":
        return KERNELS[choose(job)]
    if name not in KERNELS:
        raise ValueError(f"kernel: expected auto, {', '.join(KERNELS)}, got {name!r:.40}")
    wrong = KERNELS[name].unsupported(job)
    if wrong is not None:
        raise ValueError(f"kernel: expected for {name} {wrong}")
    return KERNELS[name]


def _rows(x: Tensor) -> Tensor:
    """Return x as fused kernels take it for granted: rows in one piece, on CUDA aligned to 16 B."""
    # Rows that are no multiple of 16 B long go to no fused kernel.
    if x.device.type == "cpu" or x.shape[-1] * x.element_size() % 16:
        aligned = True
    else:
        apart = [n for n, size in zip(x.stride(), x.shape[:-1], strict=False) if size > 1]
        aligned = not any(n % 16 for n in (x.data_ptr(), *(n * x.element_size() for n in apart)))
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
